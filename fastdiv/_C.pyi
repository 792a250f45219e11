divergences: list[str]
outputs: list[str]
state_fields: int

class Logits:
    def __init__(self, data: int, offsets: int, stride: int, dtype: int, scale: float, softcap: float) -> None: ...

class Target:
    def __init__(self, data: int, offsets: int, stride: int, dtype: int) -> None: ...

class Tile:
    def __init__(
        self,
        student: Logits,
        teacher: Logits,
        rows: int,
        columns: int,
        first_column: int,
        inverse_temperature: int,
        labels: int,
        labels_per_row: int,
        mask: int,
        ignore_index: int,
    ) -> None: ...

class Output:
    def __init__(self, number: int, compared: int, forward: float, reverse: float) -> None: ...

class FinishedRows:
    def __init__(
        self,
        rows: int,
        labels_per_row: int,
        compared_per_row: int,
        ignore_index: int,
        vocabulary: int,
        inverse_temperature: int,
        labels: int,
        state: int,
        label_logits: int,
        compared: int,
        rank: int,
    ) -> None: ...

def accumulate(tile: Tile, wanted: int, state: int, label_logits: int, threads: int) -> None: ...
def compare(
    tile: Tile,
    divergences: list[int],
    parameters: list[float],
    state: int,
    label_logits: int,
    sums: int,
    rank: int,
    threads: int,
) -> None: ...
def gradient(
    tile: Tile,
    divergences: list[int],
    parameters: list[float],
    state: int,
    coefficients: int,
    label_gains: int,
    student: Target,
    teacher: Target,
    threads: int,
) -> None: ...
def finish(rows: FinishedRows, output: Output, to: int, threads: int) -> None: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def choose_isa(name: str) -> None: ...
