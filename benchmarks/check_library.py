"""Compares the library of models with the hub: repositories, quantizations, sizes, parameters.

It prints a line for each difference and exits with 1 if there are any, or if the hub cannot be
reached. `--write` adds today to the entries without a difference. HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import huggingface_hub

from headrace.core.errors import UnknownModel
from headrace.models import library
from headrace.models.library import Library, LibraryModel
from headrace.models.reference import HubReference, parse
from headrace.models.source_hub import HubFile, choose

_NEAR = 0.12
"""Largest difference of a size or a number of parameters, as a share."""


def differences(known: Library, model: LibraryModel) -> Iterator[str]:
    """Yield what the hub has otherwise.

    Raises:
        Exception: the hub's client's, where it cannot be reached or has no such repository.
    """
    reference = parse(model.reference)
    assert isinstance(reference, HubReference)
    hub = huggingface_hub.HfApi()
    info = hub.model_info(reference.repo, files_metadata=True)
    files = [HubFile(file.rfilename, file.size or 0) for file in info.siblings or ()]
    for kind in model.quantizations:
        other = known.find(f"{model.name}-{kind.lower()}") or model
        try:
            chosen = choose(HubReference(reference.repo, quantization=kind), files)
        except UnknownModel:
            yield f"there is no {kind}"
            continue
        size = sum(file.size for file in chosen if "mmproj" not in file.name.lower())
        yield from _compared(f"bytes of {kind}", other.size, size)
    facts = cast("dict[str, Any]", getattr(info, "gguf", None) or {})
    yield from _compared("parameters", model.parameters, facts.get("total"))
    if facts.get("context_length") not in (None, model.context_length):
        yield f"context: {model.context_length} here, {facts['context_length']} there"


def _compared(name: str, here: int, there: int | None) -> Iterator[str]:
    if there and abs(here / there - 1) > _NEAR:
        yield f"{name}: {here:,} here, {there:,} there"


def written(text: str, model: LibraryModel, day: str) -> str:
    """Return the library's text with the day on which an entry was compared."""
    family, _, tag = model.name.partition(":")
    head = rf'(\[(?:{re.escape(family)}|"{re.escape(family)}")\.tags\."{re.escape(tag)}"\]\n)'
    return re.sub(rf"{head}(?:checked = .*\n)?", rf"\g<1>checked = {day}\n", text)


def main() -> int:
    """Compare all models, or those that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="models, by default all")
    parser.add_argument("--write", action="store_true", help="write the day of the comparison")
    parser.add_argument(
        "--file", type=Path, default=Path(library.__file__).with_name(library.FILE_NAME)
    )
    arguments = parser.parse_args()
    known = library.read(arguments.file.read_bytes())
    models = [m for m in known if not arguments.names or m.name in arguments.names]
    day, wrong = datetime.now(UTC).date().isoformat(), 0
    for model in models:
        try:
            lines = [*differences(known, model)]
        except Exception as error:  # noqa: BLE001 - whatever the hub's client raises
            lines = [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
        wrong += bool(lines)
        for line in lines:
            print(f"{model.name}: {line}")
        if arguments.write and not lines:
            text = arguments.file.read_text(encoding="utf-8")
            arguments.file.write_text(written(text, model, day), encoding="utf-8")
    print(f"{len(models) - wrong} of {len(models)} are as the hub has them.")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
