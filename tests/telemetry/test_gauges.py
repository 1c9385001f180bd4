from __future__ import annotations

from headrace.core.record import Phase, RunningRequest
from headrace.core.status import ModelStatus, PoolStatus, ReplicaStatus
from headrace.telemetry.gauges import gauges


def request(phase: Phase, prompt: int, written: int) -> RunningRequest:
    return RunningRequest(
        id="r",
        model="m",
        operation="chat",
        client="",
        since=0.0,
        phase=phase,
        prompt_tokens=prompt,
        completion_tokens=written,
    )


def usage(*running: RunningRequest, slots: int | None = 2) -> dict[str, float]:
    loaded = ModelStatus(id="m", source="s", state="ready", context_length=100, max_running=slots)
    unloaded = ModelStatus(id="n", source="s", state="stopped")
    status = PoolStatus(models=(loaded, unloaded), devices=())
    families = {family.name: family for family in gauges(status, running)}
    samples = families["headrace_kv_cache_usage_ratio"].samples
    return {sample.labels["model"]: sample.value for sample in samples}


def test_how_much_of_the_cache_is_in_use() -> None:
    """Issue 15.4: a picker of Kubernetes' gateway reads it, from 0 to 1 for each model."""
    assert usage() == {"m": 0.0, "n": 0.0}
    assert usage(request("prefill", 40, 0), request("decode", 50, 10))["m"] == 0.5
    # What waits holds nothing, whatever is known of its prompt.
    assert usage(request("queued", 90, 0), request("decode", 20, 0))["m"] == 0.1
    assert usage(*[request("decode", 100, 50)] * 3)["m"] == 1.0
    assert usage(request("decode", 20, 0), slots=None)["m"] == 0.0


def test_workers_that_draft_now() -> None:
    """Issue 17.3: drafts that lose switch themselves off; a model without any has no series."""
    replicas = [ReplicaStatus(number=n, state="ready", drafting=n > 0) for n in range(3)]
    models = (
        ModelStatus(id="m", source="s", state="ready", replicas=(*replicas,)),
        ModelStatus(
            id="n", source="s", state="ready", replicas=(ReplicaStatus(number=0, state="ready"),)
        ),
    )
    families = {family.name: family for family in gauges(PoolStatus(models=models, devices=()))}
    samples = families["headrace_workers_drafting"].samples
    assert [(sample.labels["model"], sample.value) for sample in samples] == [("m", 2.0)]
