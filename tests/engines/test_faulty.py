from __future__ import annotations

from pathlib import Path

import pytest
from tests.engines import faulty
from tests.worker.rig import ask

from headrace import engines
from headrace.core.errors import GenerationFailed, OutOfMemory, WorkerDied
from headrace.core.model import ModelSpec
from headrace.core.stream import collect
from headrace.models.inspect import inspect
from headrace.worker.process import WorkerProcess
from headrace.worker.spec import OnProgress, WorkerSpec


@pytest.mark.parametrize(
    ("fault", "error"), [("raise", GenerationFailed), ("oom", OutOfMemory), ("crash", WorkerDied)]
)
async def test_the_real_model_faults_once_when_told_to(
    fault: str,
    error: type[Exception],
    smollm2_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """W19, W26: in a process of its own; the trigger is gone, and a new one serves."""
    faulty.install(tmp_path / "site", monkeypatch)
    file, trigger = inspect(smollm2_path), tmp_path / "now"
    assert engines.choose(file, "faulty") == ("faulty", "asked for by name")

    def resolve(spec: ModelSpec, on_progress: OnProgress) -> WorkerSpec:
        return WorkerSpec(model=spec, file=file, engine="faulty")

    options = {"slots": 2, "threads": 1, "trigger": str(trigger), "fault": fault}
    spec = ModelSpec(name="m", model="m", context_length=256, options=options)
    one = WorkerProcess(spec, resolve)
    await one.start()
    request = ask("The river", max_tokens=4, temperature=0.0)
    whole = await collect(one.ask(request))
    trigger.touch()
    with pytest.raises(error):
        await collect(one.ask(request))
    assert not trigger.exists()
    await one.start()
    assert (await collect(one.ask(request))).text == whole.text
    await one.aclose()
