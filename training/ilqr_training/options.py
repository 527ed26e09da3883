"""Options shared by several verbs, and the number of threads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ilqr_vae.machine import cores

RecordingFile = Annotated[Path, typer.Option(help="A .nwb, .mat or .h5 recording.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the numbers here; - is standard output.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Number of CPU threads.", show_default="one per core")
]
Steps = Annotated[
    int | None, typer.Option(help="Number of gradient steps.", show_default="the config's")
]
Cpus = Annotated[int, typer.Option(min=1, help="Number of cores of each task.")]
Gpus = Annotated[float, typer.Option(min=0.0, help="Number of GPUs of each task, or a share.")]
Silent = Annotated[float, typer.Option(help="With --stress: the share of units that fall silent.")]
Lost = Annotated[
    list[float] | None,
    typer.Option(
        help="With --stress: the share of bins lost; repeat for several.",
        show_default="0.1 and 0.3",
    ),
]
Draws = Annotated[int, typer.Option(help="With --stress: the number of random draws averaged.")]


def use_threads(count: int | None) -> None:
    """Use this many threads for the compiled kernels, and one for torch.

    The batched torch operations here are small, and on a busy machine two thread pools on the same
    cores slow each other by an order of magnitude.
    """
    import torch  # imported late, so that verbs that do not need it start faster

    from ilqr_vae.kernels.cpu import threads

    torch.set_num_threads(1)
    threads.use(count or cores())
