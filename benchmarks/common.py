"""A benchmark case: its inputs, its contestants, its floor, and how they are run, compared and timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastdiv import backends

from .floors import Floor
from .timing import Meter, interleave, meter

Tensors = dict[str, Tensor]
Contestant = Callable[..., Tensors]
"""From a case's inputs, by name, to its outputs; "loss" is what the gradient is taken of."""
EAGER, COMPILE, FASTDIV, TRITON, FLOOR = "eager", "torch.compile", "fastdiv", "fastdiv triton", "floor"
# Of a tensor's largest magnitude.  Plain torch in float32 is what is inexact: its js gradient at 512 x 49152 is 3e-4
# off, as float64 shows, and fastdiv's 6e-6.  In bfloat16 a gradient is rounded to 4e-3 of itself.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}


class Disagreement(RuntimeError):
    """A contestant computed something else, so its time means nothing."""


class Unavailable(RuntimeError):
    """A contestant cannot run on this machine."""


@dataclass(frozen=True)
class Place:
    """Where the cases run, and on what: `name` chooses their sizes."""

    name: str
    device: str
    dtype: torch.dtype

    def generator(self) -> torch.Generator:
        """The same numbers in every process."""
        return torch.Generator(self.device).manual_seed(0)


PLACES = {"cpu": Place("cpu", "cpu", torch.float32), "cuda": Place("cuda", "cuda", torch.bfloat16)}


@dataclass(frozen=True)
class Settings:
    """What the command line chose for all cases."""

    scale: str = "full"
    rounds: int | None = None
    compile: bool = True
    memory: bool = True


@dataclass
class Result:
    """What one case gave."""

    shape: dict[str, int]
    timed: str
    floor: str
    choices: list[str]
    """The fastest way to run each pass of the floor."""
    times: dict[str, list[float]]
    """Seconds per round, of the floor and of each contestant."""
    amount: float | None = None
    unit: str = ""
    absent: dict[str, str] = field(default_factory=dict)
    """Why a contestant is missing."""
    dtype: str = "float32"
    backends: dict[str, str] = field(default_factory=dict)
    """What the contestants of `Case.ours` ran on."""
    moved: dict[str, float] = field(default_factory=dict)
    """Bytes that the kernels of fastdiv's contestants read and write, where that is all they do."""
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    """Per contestant, bytes: "peak" beyond the inputs; "results", held by outputs and gradients at the end."""


@dataclass(frozen=True)
class Case:
    """One work for several contestants.

    Arguments:
        name: unique within its file.
        shape: sizes, for the report.
        make: builds the inputs, always the same ones.
        contestants: by name; `standard` gives the usual three.
        floor: what the work costs at least.
        timed: "forward" (without autograd), "backward", or "forward + backward".
        gradients: names of the inputs whose gradient is asked for.
        rounds: how often each contestant is timed, unless the command line says.
        device: where the inputs are.
        tolerance: how far a result may be off, of its tensor's largest magnitude.
        dtype: of the inputs' numbers.
        ours: contestants that are fastdiv on a backend to be named, and the one they ask for; None: the preferred one.
        moved: from a backend (None: one of `ours` it is not) to the bytes that its kernels read and write
            (`floors.bytes_moved`), for a work from logits.
        guests: contestants of other packages; one that computes something else is left out and named.
    """

    name: str
    shape: dict[str, int]
    make: Callable[[], Tensors]
    contestants: Mapping[str, Contestant]
    floor: Floor
    timed: Literal["forward", "backward", "forward + backward"]
    gradients: tuple[str, ...]
    rounds: int
    device: str = "cpu"
    tolerance: float = TOLERANCE[torch.float32]
    dtype: torch.dtype = torch.float32
    ours: Mapping[str, str | None] = field(default_factory=dict)
    moved: Callable[[str | None], float] | None = None
    guests: tuple[str, ...] = ()

    def inputs(self) -> Tensors:
        tensors = self.make()
        for name in self.gradients:
            tensors[name].requires_grad_()
        return tensors

    def execute(self, contestant: Contestant, inputs: Tensors, meter: Meter) -> tuple[float, Tensors]:
        """The contestant once: what `meter` says about the timed part, and all outputs and gradients."""

        def forward() -> Tensors:
            return contestant(**inputs)

        def backward(outputs: Tensors) -> Tensors:
            gradients = torch.autograd.grad(outputs["loss"], [inputs[name] for name in self.gradients])
            named = zip(self.gradients, gradients, strict=True)
            return {key: value.detach() for key, value in outputs.items()} | {f"d_{name}": g for name, g in named}

        if self.timed == "forward":
            with torch.no_grad():
                return meter(forward)
        if self.timed == "backward":
            outputs = forward()
            return meter(lambda: backward(outputs))
        return meter(lambda: backward(forward()))

    def run(self, settings: Settings) -> Result:
        """Warms up, checks that all contestants agree, chooses the floor, and times all of them in interleaved rounds.

        Who cannot run, or runs out of memory, is named in `Result.absent`.

        Raises:
            Disagreement: a contestant's result differs from eager torch's.
        """
        inputs, seconds = self.inputs(), meter(self.device)
        present, absent = self._warm(inputs, seconds, settings)
        if not present:
            raise Unavailable("; ".join(f"{name}: {reason}" for name, reason in absent.items()))
        floor, choices = self.floor.fastest(inputs, seconds)
        measures: dict[str, Callable[[], float]] = {FLOOR: lambda: seconds(floor)[0]}
        for name, contestant in present.items():
            measures[name] = lambda c=contestant: self.execute(c, inputs, seconds)[0]  # type: ignore[misc]
        times = interleave(measures, settings.rounds or self.rounds)
        ran_on = {name: self.backend(asked) for name, asked in self.ours.items() if name in present}
        moved = {n: self.moved(ran_on.get(n)) for n in (FASTDIV, TRITON) if n in present} if self.moved else {}
        return Result(
            self.shape,
            self.timed,
            self.floor.name,
            choices,
            times,
            self.floor.amount,
            self.floor.unit,
            absent,
            str(self.dtype).removeprefix("torch."),
            ran_on,
            moved,
        )

    def backend(self, asked: str | None = None) -> str:
        """What a call of fastdiv runs on that asks for `asked`."""
        return backends.select([self.dtype], torch.device(self.device), asked)

    def _warm(
        self, inputs: Tensors, seconds: Meter, settings: Settings
    ) -> tuple[dict[str, Contestant], dict[str, str]]:
        """Everyone once: those who can run and agree with the first of them, and why the others are absent."""
        present: dict[str, Contestant] = {}
        absent: dict[str, str] = {}
        results: dict[str, Tensors] = {}
        for name, contestant in self.contestants.items():
            if name == COMPILE and not settings.compile:
                absent[name] = "switched off"
                continue
            try:
                result = self.execute(contestant, inputs, seconds)[1]
                check_agreement(self.name, {**results, name: result}, self.tolerance)
            except Disagreement as error:
                if name not in self.guests:
                    raise
                absent[name] = str(error)
            except torch.OutOfMemoryError as error:
                absent[name] = f"out of memory: {_first_line(error)}"
            except Unavailable as error:
                absent[name] = str(error)
            except RuntimeError as error:
                if name in (EAGER, FASTDIV):
                    raise
                absent[name] = f"failed: {_first_line(error)}"
            else:
                present[name] = contestant
                results = results or {name: result}
        return present, absent


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def standard(eager: Contestant, ours: Contestant) -> dict[str, Contestant]:
    """Eager torch, the same function under torch.compile, and fastdiv."""
    return {EAGER: eager, COMPILE: compiled(eager), FASTDIV: ours}


def compiled(function: Contestant) -> Contestant:
    """`function` compiled as a whole for its exact shapes, at its first call."""
    built: list[Contestant] = []

    def call(**inputs: Tensor) -> Tensors:
        from torch._dynamo.exc import TorchDynamoException  # seconds to import: only where it is wanted

        if not built:
            torch.compiler.reset()  # no case inherits another one's recompilations
            built.append(torch.compile(function, dynamic=False))
        try:
            return built[0](**inputs)
        except TorchDynamoException as error:
            raise Unavailable(" ".join(str(error).split())[:300]) from error

    return call


def check_agreement(case: str, results: Mapping[str, Tensors], tolerance: float = TOLERANCE[torch.float32]) -> None:
    """Raises `Disagreement` unless every contestant's outputs and gradients are those of the first one.

    The largest difference may be `tolerance` of the tensor's largest magnitude; NaN never agrees.
    """
    reference, expected = next(iter(results.items()))
    for name, tensors in results.items():
        if tensors.keys() != expected.keys():
            raise Disagreement(f"{case}: {name} computes {sorted(tensors)}, {reference} {sorted(expected)}")
        for key, tensor in tensors.items():
            want, what = expected[key], f"{case}: {key} of {name}"
            if tensor.shape != want.shape:
                shapes = f"{tuple(tensor.shape)}, not {tuple(want.shape)} as that of {reference}"
                raise Disagreement(f"{what} has shape {shapes}")
            error, size = float((tensor - want).abs().max()), float(want.abs().max())
            if not error <= tolerance * size:
                raise Disagreement(f"{what} is off that of {reference} by {error:.3g}, its largest is {size:.3g}")
