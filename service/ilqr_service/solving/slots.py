"""Model slots: which model serves a slot, and how to replace it.

A model is loaded and warmed up in its own thread, beside the served ones. It then runs as the
shadow of the slot, or serves at once. The previous model is kept for a rollback. A file that cannot
be read, or a model of other units, changes nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ilqr_service import logs
from ilqr_service.sessions.effects import Effects
from ilqr_service.sessions.table import SessionTable
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.engine import Engine
from ilqr_service.solving.engines import Engines, Score, Shadow
from ilqr_service.solving.warm_up import warm_up
from ilqr_service.work import EngineInfo
from ilqr_vae.errors import IlqrVaeError, ProtocolError
from ilqr_vae.protocol import messages

_ENGINES = 8
_LOAD_S = 300.0
"""Time limit of a load, in which kernels of another family may have to be compiled."""
_LONGEST_PATH = 1024
_LOADERS = 2
"""Largest number of loading threads, including those that timed out and cannot be ended."""


@dataclass(slots=True)
class Slot:
    """The models of a slot."""

    serving: Engine
    shadow: Engine | None = None
    before: Engine | None = None
    loading: Loading | None = None


@dataclass(eq=False, slots=True)
class Loading:
    """A model that is being loaded, until ``engine`` or ``error`` is set."""

    owner: bytes
    message: messages.Load
    path: Path
    until: float
    engine: Engine | None = None
    error: IlqrVaeError | None = None


def _other(engine: Engine, model_info: EngineInfo) -> None:
    """Raise ProtocolError if this model is already served."""
    if engine.model_info.model == model_info.model:
        raise ProtocolError("model", expected="another than is served", got=model_info.model)


def _fits(engine: Engine, model_info: EngineInfo) -> None:
    """Raise ProtocolError if sessions of that model cannot continue with this engine."""
    new = engine.model_info
    _other(engine, model_info)
    if new.bin_width_ns != model_info.bin_width_ns:
        raise ProtocolError(
            "model.bin_width",
            expected=f"{model_info.bin_width_ns} ns",
            got=f"{new.bin_width_ns} ns",
        )
    for field, expected, got in (
        ("unit_names", model_info.unit_names, new.unit_names),
        ("kinematic_names", model_info.kinematic_names, new.kinematic_names),
        ("kinematic_units", model_info.kinematic_units, new.kinematic_units),
        ("classes", model_info.class_names, new.class_names),
        ("features", model_info.feature_names, new.feature_names),
    ):
        if expected != got:
            raise ProtocolError(
                f"model.{field}",
                expected=f"the served model's {len(expected)}",
                got=f"{len(got)}, or others",
            )


class Slots:
    """The slots of a service. Only the I/O thread may use them.

    Args:
        slots: first engine of each; the first slot is for sessions that name none.
        engines, table: updated with each change.
        settings: settings of all engines.
        folder: folder from which models may be loaded.
        clock: monotonic, seconds.
    """

    def __init__(
        self,
        slots: dict[str, Engine],
        engines: Engines,
        table: SessionTable,
        settings: ServiceSettings,
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots = {name: Slot(engine) for name, engine in slots.items()}
        self._engines, self._table = engines, table
        self._settings, self._folder = settings, folder.resolve()
        self._clock = clock
        self._loaders: set[threading.Thread] = set()

    def _slot(self, name: str) -> tuple[str, Slot]:
        name = name or next(iter(self.slots))
        slot = self.slots.get(name)
        if slot is None:
            raise ProtocolError("slot", expected=f"one of {', '.join(self.slots)}", got=name[:64])
        return name, slot

    def list(self) -> messages.ModelList:
        """Return all models of all slots."""
        infos: list[messages.ModelInfo] = []
        for name, slot in self.slots.items():
            shadow = self._engines.shadows.get(name)
            own, other = (shadow.own, shadow.other) if shadow else (Score(), Score())

            def info(model: str, role: str, score: Score, name: str = name) -> messages.ModelInfo:
                return messages.ModelInfo(
                    slot=name,
                    model=model,
                    role=role,  # pyright: ignore[reportArgumentType]  # one of the four below
                    bins=score.bins,
                    bits_per_spike=score.bits_per_spike,
                )

            infos.append(info(slot.serving.model_info.model, "serving", other))
            if slot.shadow is not None:
                infos.append(info(slot.shadow.model_info.model, "shadow", own))
            if slot.before is not None:
                infos.append(info(slot.before.model_info.model, "before", Score()))
            if slot.loading:
                infos.append(info(slot.loading.path.name, "loading", Score()))
        return messages.ModelList(models=tuple(infos))

    def load(self, owner: bytes, message: messages.Load) -> None:
        """Start to load. Raises ProtocolError if there is no such slot or file, or one is
        loading.
        """
        _, slot = self._slot(message.slot)
        if slot.loading:
            got = slot.loading.path.name
            raise ProtocolError("slot", expected="one that loads nothing now", got=got)
        self._loaders = {thread for thread in self._loaders if thread.is_alive()}
        if len(self._loaders) >= _LOADERS:
            raise ProtocolError("slot", expected=f"at most {_LOADERS} loads at once", got="more")
        try:
            short = len(message.path) <= _LONGEST_PATH
            path = (self._folder / message.path).resolve() if short else None
            found = path if path and path.is_relative_to(self._folder) and path.is_file() else None
        except (OSError, ValueError, RuntimeError):  # not a file name, or a loop of links
            found = None
        if found is None:
            got = message.path[:64]
            raise ProtocolError("path", expected="a file in the model folder", got=got)
        slot.loading = Loading(owner, message, found, self._clock() + _LOAD_S)
        thread = threading.Thread(
            target=self._load,
            args=(slot.loading, slot.serving.model_info),
            name="load",
            daemon=True,
        )
        self._loaders.add(thread)
        thread.start()

    def _load(self, loading: Loading, model_info: EngineInfo) -> None:
        """Load a model; runs in its own thread."""
        try:
            engine = Engine.load(loading.path, self._settings)
            _fits(engine, model_info)
            warm_up(engine)
            loading.engine = engine
        except IlqrVaeError as error:
            loading.error = error
        except Exception as error:
            logs.exception("a model could not be loaded", path=str(loading.path))
            got = repr(error)[:160]
            loading.error = ProtocolError("model", expected="one that loads", got=got)

    def loaded(self) -> Effects:
        """Handle loads that are done or take too long; call often."""
        effects = Effects()
        for name, slot in self.slots.items():
            done = slot.loading
            if done is None:
                continue
            engine, error = done.engine, done.error
            if engine is None and error is None:
                if self._clock() < done.until:
                    continue
                # its thread cannot be ended; its result is ignored
                error = ProtocolError("model", expected=f"one that loads in {_LOAD_S:g} s", got="")
            slot.loading = None
            if engine is not None:
                # meanwhile the model may serve here, or in another slot
                engine = self._engines.engines.get(engine.model_info.model, engine)
                try:
                    _other(engine, slot.serving.model_info)
                except ProtocolError as same:
                    error = same
            if engine is None or error is not None:
                error = error or ProtocolError("model", expected="one that loads", got="")
                refused = ProtocolError(error.field, expected=error.expected, got=error.got)
                failed = Effects.refusal(done.owner, refused)
                effects.replies += failed.replies
                for event, times in failed.events.items():
                    effects.events[event] += times
                effects.events["load_failed"] += 1
                continue
            self._add(engine)
            if done.message.shadow:
                self._stop_shadow(name, slot)
                slot.shadow = engine
                self._engines.shadows[name] = Shadow(engine)
            else:
                self._serve(name, slot, engine, effects)
            effects.replies.append((done.owner, self.list()))
        return effects

    def swap(self, owner: bytes, message: messages.Swap) -> Effects:
        """Serve the shadow. Raises ProtocolError if there is none."""
        name, slot = self._slot(message.slot)
        if slot.shadow is None:
            raise ProtocolError("slot", expected="one with a shadow", got=name)
        effects = Effects()
        self._serve(name, slot, slot.shadow, effects)
        effects.replies.append((owner, self.list()))
        return effects

    def rollback(self, owner: bytes, message: messages.Rollback) -> Effects:
        """Drop the shadow, or serve the previous model. Raises ProtocolError if there is
        neither.
        """
        name, slot = self._slot(message.slot)
        effects = Effects()
        if slot.shadow is not None:
            self._stop_shadow(name, slot)
        elif slot.before is not None:
            self._serve(name, slot, slot.before, effects)
        else:
            raise ProtocolError("slot", expected="one that served another model", got=name)
        effects.replies.append((owner, self.list()))
        return effects

    def _add(self, engine: Engine) -> None:
        engines = self._engines.engines
        engines[engine.model_info.model] = engine
        used = {
            e.model_info.model
            for s in self.slots.values()
            for e in (s.serving, s.shadow, s.before)
            if e
        }
        spare = [m for m in engines if m not in used and m != engine.model_info.model]
        for model in spare[: max(0, len(engines) - _ENGINES)]:
            if len(engines[model]) == 0:
                del engines[model]

    def _stop_shadow(self, name: str, slot: Slot) -> None:
        self._engines.shadows.pop(name, None)
        slot.shadow = None

    def _serve(self, name: str, slot: Slot, engine: Engine, effects: Effects) -> None:
        self._stop_shadow(name, slot)
        slot.before, slot.serving = slot.serving, engine
        swapped = self._table.swap(name, engine.model_info)
        effects.work += swapped.work
        effects.published += swapped.published
        effects.events["swapped"] += 1
        effects.served.append((name, engine.model_info.model, engine.manifest))
        logs.info("model", slot=name, model=engine.model_info.model)
