"""Checks of a model's settings that need more than the settings themselves."""

from __future__ import annotations

from headrace import engines as engine_registry
from headrace.core.errors import ConfigError
from headrace.core.model import ModelSpec
from headrace.engines.base import check_task
from headrace.models.providers import PROVIDERS
from headrace.models.reference import is_remote
from headrace.text.calls.families import FAMILIES


def verify(spec: ModelSpec) -> None:
    """Check settings that depend on engines, providers and families of models.

    Raises:
        ConfigError: one is not accepted; `param` is the setting.
    """
    if spec.tool_format is not None and spec.tool_format not in FAMILIES:
        raise ConfigError(
            f"{spec.tool_format} is none of {', '.join(FAMILIES)}.", param="tool_format"
        )
    _check_task(spec)
    _check_adapters(spec)


def _check_adapters(spec: ModelSpec) -> None:
    """Check that what is to run a model can have adapters.

    Raises:
        ConfigError: it cannot.
    """
    if not spec.adapters:
        return
    if is_remote(spec.model):
        raise ConfigError("A model at another service has its adapters there.", param="adapters")
    if spec.task not in {None, "generate"}:
        raise ConfigError("Adapters go with the task generate.", param="adapters")
    if spec.engine is not None:
        engine_registry.check_able(spec.engine, "adapters")


def _check_task(spec: ModelSpec) -> None:
    """Check that what is to run a model has its task.

    Raises:
        ConfigError: its provider or its engine has not.
    """
    if spec.task is None:
        return
    engine = spec.engine
    if is_remote(spec.model):
        provider = PROVIDERS[spec.model.partition(":")[0]]
        engine = engine or provider.engine
        check_task(spec.task, provider.title, provider.tasks)
    if engine is not None:
        check_task(spec.task, f"Engine {engine}", engine_registry.about(engine).tasks)
