"""What only the CUDA row kernels promise, in lock-step on a CPU: no order of threads shows, no byte outside a row is
touched, one launch where one was promised, every pair of dtypes.

Where there is a GPU the same kernels run there in the tests of every backend, and `test_gpu.py` has what only a GPU
shows.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv
from fastdiv import backends
from fastdiv.backends import cuda
from fastdiv.divergences import DIVERGENCES
from fastdiv.request import Transform
from fastdiv.statistics import Prepared, Tokens, empty_state
from fastdiv.testing import assert_bitwise_equal, reference
from fastdiv.tiles import Rows, Tile

if not cuda.in_lockstep():
    pytest.skip("these call the kernels on CPU tensors", allow_module_level=True)
if reason := backends.available()["cuda"]:
    raise RuntimeError(f"the CUDA kernels in lock-step are absent: {reason}")

NATIVE: Any = cuda.module()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of a thread, a warp, a block, a cluster that keeps its row, and a row that must be read twice.
SIZES = (1, 7, 33, 700, 1900, 5003)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3.0).to(dtype)


@pytest.fixture
def scheduled() -> Iterator[None]:
    yield
    NATIVE.cuda.schedule(0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels as they are launched."""
    names: list[str] = []

    class Recorder:
        def __init__(self, kernels: Any) -> None:
            self._kernels = kernels

        def __getattr__(self, name: str) -> Any:
            function = getattr(self._kernels, name)

            def call(*values: Any) -> Any:
                names.append(name)
                return function(*values)

            return call

    class Module:
        cuda = Recorder(NATIVE.cuda)
        Tile, Logits, Target = NATIVE.Tile, NATIVE.Logits, NATIVE.Target

    monkeypatch.setattr(backends.get("cuda"), "_native", Module)
    return names


def everything(x: Tensor, y: Tensor, labels: Tensor) -> list[Tensor]:
    """Outputs and gradients by every kernel; the first over its own logits, which are a tile of hidden states."""
    hidden = torch.eye(x.shape[0]).requires_grad_()
    own = fastdiv.log_prob(fastdiv.LinearLogits(hidden, x.detach().float().T.contiguous()), labels, backend="cuda")
    results = [own.detach(), *torch.autograd.grad(own.sum(), hidden)]
    weights = {"log_prob": torch.ones(x.shape[0]), "entropy": 0.5, "logsumexp": -0.25}
    stats, gradient = fastdiv.value_and_gradient(x.detach().clone(), labels, weights, overwrite=True, backend="cuda")
    results += [*stats.values(), gradient]
    for outputs in (
        ("log_prob", "entropy"),
        ("varentropy", "argmax", "max_log_prob", "log_sum_sq_probs", "mean_logit", "rank"),
        ("entropy", "forward_kl"),
        ("reverse_kl",),
        ("jeffreys",),
        ("js",),
        ("varentropy", "jeffreys", "js", "tv"),
    ):
        teacher = {"teacher": y} if any(name in DIVERGENCES for name in outputs) else {}
        stats = fastdiv.token_stats(x, labels, outputs=outputs, backend="cuda", **teacher)
        differentiable = [v for v in stats.values() if v.requires_grad]
        wanted = [x, y] if teacher and outputs[-1] != "js" else [x]
        results += [v.detach() for v in stats.values()]
        results += torch.autograd.grad(torch.stack(differentiable).sum(), wanted)
    return results


@pytest.mark.usefixtures("scheduled")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", SIZES)
def test_no_order_of_threads_shows(v: int, dtype: torch.dtype) -> None:
    """A missing barrier would: warps run ahead of others, each schedule in another way."""
    x, y = (random(2, v, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2))
    labels = torch.tensor([v - 1, v // 2])
    want = everything(x, y, labels)
    for seed in range(1, 5):
        NATIVE.cuda.schedule(seed)
        for got, expected in zip(everything(x, y, labels), want, strict=True):
            assert_bitwise_equal(got, expected)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str)
@pytest.mark.parametrize("v", [33, 5003])
def test_models_of_two_dtypes(v: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, y = (random(3, v, seed=seed, dtype=dtype).requires_grad_() for seed, dtype in enumerate(dtypes))
    outputs = ("entropy", "varentropy", "forward_kl", "reverse_kl", "js", "tv")
    got = fastdiv.token_stats(x, teacher=y, outputs=outputs, backend="cuda")
    exact = reference(x.double(), teacher=y.double(), outputs=outputs, dtype=torch.float64)
    for name in outputs:
        assert torch.allclose(got[name].double(), exact[name], rtol=4e-6, atol=1e-6), name
    total = sum(got[name].sum() for name in outputs)
    gradients = torch.autograd.grad(total, (x, y))
    doubles = [t.detach().double().requires_grad_() for t in (x, y)]
    wanted = fastdiv.token_stats(doubles[0], teacher=doubles[1], outputs=outputs, backend="reference")
    for g, e in zip(gradients, torch.autograd.grad(sum(wanted.values()).sum(), doubles), strict=True):
        step = torch.finfo(g.dtype).eps
        assert ((g.double() - e).abs() <= step * e.abs() + 2e-6 * e.abs().max() + torch.finfo(g.dtype).tiny).all()


# Memory


class Fenced:
    """A tensor with pages on both sides that nobody may touch."""

    def __init__(self, shape: tuple[int, int], stride: int, dtype: torch.dtype, at_end: bool) -> None:
        page, size = mmap.PAGESIZE, torch.finfo(dtype).bits // 8
        # The last row has no gap after it.
        elements = (shape[0] - 1) * stride + shape[1]
        used = -(-elements * size // page) * page
        self._memory = mmap.mmap(-1, used + 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        libc = ctypes.CDLL(None, use_errno=True)
        for fence in (base, base + page + used):
            assert libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) == 0
        offset = page + (used - elements * size if at_end else 0)
        buffer = torch.frombuffer(self._memory, dtype=dtype, count=elements, offset=offset)
        self.tensor = buffer.as_strided(shape, (stride, 1))


FENCED = """
import sys, torch
sys.path[:0] = {path!r}
import fastdiv
from test_cuda_rows import DTYPES, Fenced, everything, random
for dtype in DTYPES:
    for v in {sizes}:
        for stride in (v, v + 1):
            for at_end in (False, True):
                x, y = (Fenced((3, v), stride, dtype, at_end).tensor for _ in range(2))
                x.copy_(random(3, v, seed=1, dtype=dtype))
                y.copy_(random(3, v, seed=2, dtype=dtype))
                # A label far outside is not an address.
                labels = torch.tensor([v - 1, 2**40, -(2**40)])
                fastdiv.engine.Problem._check_labels = lambda self: None
                everything(x.requires_grad_(), y.requires_grad_(), labels)
print("untouched")
"""


def test_no_byte_outside_the_rows_is_touched() -> None:
    """In a process of its own: there the first such byte is the end.  Rows of 16-bit numbers begin anywhere."""
    program = FENCED.format(path=sys.path, sizes=SIZES)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "untouched\n", done.stderr[-2000:]


def test_the_fence_is_there() -> None:
    program = f"import sys; sys.path[:0] = {sys.path!r}\nimport torch\nfrom test_cuda_rows import Fenced\n"
    program += "t = Fenced((3, 33), 33, torch.float32, True).tensor\nprint(t.sum(), flush=True)\n"
    program += "import ctypes; ctypes.string_at(t.data_ptr() + 3 * 33 * 4, 1)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout and done.returncode == -11, done.stderr[-2000:]


@pytest.mark.parametrize("v", [700, 5003])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_gradient_may_lie_in_the_first_half_of_its_row(dtype: torch.dtype, v: int) -> None:
    """The tiles of hidden states in 16 bits."""
    logits = torch.log_softmax(random(5, v), -1)
    want = logits.exp().to(dtype)
    buffer = logits.clone()
    target = Rows(buffer.view(dtype)[:, :v], None, Transform())
    nothing = torch.zeros(5, 0)
    tokens = Tokens(torch.ones(5), nothing.long(), -100, None, v)
    state = empty_state(5, torch.device("cpu"))
    state[:, 0], state[:, 1] = 0.0, 0.0  # normalisers of 1: logits are log-probabilities
    c = torch.zeros(5, 6)
    c[:, 0] = 1.0
    tile = Tile(Rows(buffer, None, Transform()), None, 0, v, tokens)
    backends.get("cuda").gradient(tile, Prepared(c, nothing.long(), nothing, []), state, target, None)
    error = (buffer.view(dtype)[:, :v].float() - want.float()).abs()
    assert (error <= 2.0 * torch.finfo(dtype).eps * want.float().clamp(min=torch.finfo(dtype).tiny)).all()


# Launches


@pytest.mark.parametrize(
    ("outputs", "forward"),
    [
        (("log_prob", "entropy"), ["statistics"]),
        (("log_prob", "entropy", "reverse_kl"), ["statistics"]),
        (("log_prob", "entropy", "js"), ["statistics"]),
        (("js", "tv"), ["statistics", "statistics"]),
        (("varentropy", "js"), ["statistics", "statistics"]),
        (("rank",), ["statistics", "rank"]),
    ],
    ids=lambda value: "+".join(value),
)
def test_launches(outputs: tuple[str, ...], forward: list[str], launched: list[str]) -> None:
    """A divergence that needs both normalisers comes with them; each further one is a launch."""
    x, y, labels = random(3, 700).requires_grad_(), random(3, 700, seed=1), torch.arange(3)
    teacher = {"teacher": y} if any(name in DIVERGENCES for name in outputs) else {}
    stats = fastdiv.token_stats(x, labels, outputs=outputs, backend="cuda", **teacher)
    assert launched == forward
    launched.clear()
    if differentiable := [v.sum() for v in stats.values() if v.requires_grad]:
        torch.stack(differentiable).sum().backward()
        assert launched == ["gradient"]


def test_value_and_gradient_take_one_launch_where_a_row_fits(launched: list[str]) -> None:
    for v, names in ((700, ["value_and_gradient"]), (3001, ["value_and_gradient", "statistics", "gradient"])):
        launched.clear()
        fastdiv.value_and_gradient(random(5, v), torch.arange(5), {"log_prob": 1.0, "entropy": 0.1}, backend="cuda")
        assert launched == names  # the first refuses a row that does not fit


def test_masked_rows_are_neither_read_nor_change_others() -> None:
    x, labels = random(6, 700), torch.arange(6)
    mask = torch.tensor([True, False, True, True, False, True])
    spoiled = torch.where(mask[:, None], x, torch.nan).requires_grad_()
    outputs = ("log_prob", "entropy", "rank")
    got = fastdiv.token_stats(spoiled, labels, mask=mask, outputs=outputs, backend="cuda")
    alone = x[mask].requires_grad_()
    want = fastdiv.token_stats(alone, labels[mask], outputs=outputs, backend="cuda")
    for name in outputs:
        assert_bitwise_equal(got[name][mask], want[name], name)
        assert (got[name][~mask] == 0).all()
    gradients = [torch.autograd.grad(s.log_prob.sum() + s.entropy.sum(), t) for s, t in ((got, spoiled), (want, alone))]
    assert_bitwise_equal(gradients[0][0][mask], gradients[1][0])
    assert (gradients[0][0][~mask] == 0).all()


# Errors


def test_a_launch_that_fails_says_which_and_what_the_build_has() -> None:
    x = random(2, 9)
    # More columns than are counted in 32 bits: no kernel is launched.
    wide = NATIVE.Tile(
        NATIVE.Logits(x.data_ptr(), 0, 9, 0, 1.0, 0.0), NATIVE.Logits(0, 0, 0, 0, 1.0, 0.0), 2, 2**31, 0, 0, 0, 0, 0, 0
    )
    with pytest.raises(ValueError, match="statistics on 2 x 2147483648 float32: no CUDA kernel was built for this"):
        NATIVE.cuda.statistics(wide, 0, -1, 0.0, True, False, 0, 0, 0, 0, 0, 0)
    # Labels' gradients lie in shared memory: as many as these do not fit, on no GPU.
    many = torch.zeros(2, 1 << 20, dtype=torch.int64)
    x.requires_grad_()
    text = r"CUDA kernel gradient on 2 x 9 float32: invalid argument \(this build has code for lockstep\)"
    with pytest.raises(RuntimeError, match=text):
        fastdiv.log_prob(x, many, backend="cuda").sum().backward()
