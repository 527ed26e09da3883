"""``ilqr-vae follow``: keep a served model adapted to the stream that it decodes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from ilqr_clients.follow import Follower, Policy, Verdict
from ilqr_clients.sdk import ServiceClient
from ilqr_vae.errors import ServiceError
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    epilog="Example: ilqr-vae follow rat-7 monday.safetensors --policy automatic --seconds 90"
)
def run(
    session: Annotated[str, typer.Argument(help="The session to follow.")],
    model: Annotated[Path, typer.Argument(help="The model file that is served, in its folder.")],
    to: Annotated[str, typer.Option(help="The service's address.")] = "tcp://127.0.0.1:5555",
    policy: Annotated[
        Policy,
        typer.Option(
            help="What becomes of a model that predicts the stream better: nothing is tried, it "
            "waits in the shadow for a person to swap it in, or it is swapped in."
        ),
    ] = "propose",
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of the stream to fit on.")] = 90.0,
    trial: Annotated[float, typer.Option(min=1, help="Seconds of stream in the shadow.")] = 30.0,
    threshold: Annotated[
        float,
        typer.Option(
            help="Fit where the index is below: bits per spike of the last minute over those on "
            "held-out data at training."
        ),
    ] = 0.8,
    targets: Annotated[
        bool,
        typer.Option(
            "--targets",
            help="Use targets in the session's events as labels: the intended velocity is the "
            "decoded speed, in the direction of the target. The readout is fitted too.",
        ),
    ] = False,
    attempts: Annotated[
        int | None, typer.Option(min=1, help="End after so many attempts.", show_default="no end")
    ] = None,
) -> None:
    """Refit the units of the served model when it no longer predicts the stream, without labels.

    The fit runs in a separate process. A candidate that `ilqr-vae adapt` does not refuse runs in
    the shadow, and is used only if it predicts the same bins better than the serving model. If it
    later predicts worse, it is rolled back. The service's journal records each step.
    """
    screen = console(soft_wrap=True)

    def say(line: str) -> None:
        screen.print(line, markup=False, highlight=False)

    with (
        ServiceClient(to) as service,
        closing(
            Follower(
                service,
                session,
                model,
                policy=policy,
                seconds=seconds,
                trial=trial,
                targets=targets,
                say=say,
            )
        ) as follower,
    ):
        made = follower.run(attempts=attempts, threshold=threshold)
    if made and made[-1].verdict not in (Verdict.SWAPPED, Verdict.PROPOSED):
        raise ServiceError("follow", expected="a better model", got=str(made[-1]))
