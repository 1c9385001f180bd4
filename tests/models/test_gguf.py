from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from tests.models.builders import (
    ARRAY,
    F32,
    PAIRS,
    STRING,
    TENSORS,
    U32,
    U64,
    Pair,
    gguf,
    text,
    with_pairs,
)

from headrace.core.errors import LoadFailed
from headrace.models.gguf import Skipped, read_header, read_vocabulary
from headrace.models.gguf_model import describe


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def describe_bytes(file: Path, data: bytes):
    file.write_bytes(data)
    return describe(file)


def test_tells_what_is_in_the_file(file: Path) -> None:
    """W22: architecture, parameters, quantisation, context and template come from the header."""
    model = describe_bytes(file, gguf())
    assert (model.format, model.architecture, model.quantization) == ("gguf", "llama", "Q8_0")
    assert model.parameters == 64 * 50 + 64 * 64 + 65
    assert model.context_length == 2048
    assert model.size == file.stat().st_size
    assert model.kv_bytes_per_token == 2 * 2 * (8 + 8) * 2
    assert model.chat_template is not None
    assert "m.content" in model.chat_template


def test_vocabularies_are_walked_over_and_scalars_kept(file: Path) -> None:
    file.write_bytes(gguf())
    metadata = read_header(file).metadata
    assert metadata["tokenizer.ggml.tokens"] == Skipped(50, longest=7)
    assert metadata["tokenizer.ggml.bos_token_id"] == 1
    assert metadata["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.parametrize(
    ("context", "kind", "factor", "original", "expected"),
    [
        (2048, None, None, None, 2048),
        (32768, "yarn", 4.0, 32768, 131072),
        (131072, "llama3", 8.0, 8192, 131072),
        (4096, "linear", 4.0, None, 16384),
        (4096, "none", 4.0, None, 4096),
        (100_000_000, None, None, None, None),
    ],
)
def test_context_length_counts_rope_scaling(
    file, context, kind, factor, original, expected
) -> None:
    """W6: rope scaling counts, and values of 1e8 or more are no limit."""
    extra: list[Pair] = [("llama.context_length", U64, context)]
    if kind:
        extra += [
            ("llama.rope.scaling.type", STRING, kind),
            ("llama.rope.scaling.factor", F32, factor),
        ]
    if original:
        extra += [("llama.rope.scaling.original_context_length", U32, original)]
    pairs = [*with_pairs(llama__context_length=None), *extra]
    assert describe_bytes(file, gguf(pairs)).context_length == expected


def test_heads_may_differ_between_layers(file: Path) -> None:
    heads = ("llama.attention.head_count_kv", ARRAY, (U32, [2, 4]))
    pairs = with_pairs(llama__attention__head_count_kv=heads)
    assert describe_bytes(file, gguf(pairs)).kv_bytes_per_token == 6 * 16 * 2
    short = ("llama.attention.head_count_kv", ARRAY, (U32, [2]))
    with pytest.raises(LoadFailed, match="does not fit 2 layers"):
        describe_bytes(file, gguf(with_pairs(llama__attention__head_count_kv=short)))


def test_quantisation_is_that_of_most_bytes_if_not_named(file: Path) -> None:
    model = describe_bytes(file, gguf(with_pairs(general__file_type=None)))
    assert model.quantization == "F16"


HEAD = b"GGUF" + struct.pack("<I", 3)
HOSTILE = {
    "empty header": b"GGUF",
    "version": b"GGUF" + struct.pack("<IQQ", 9, 1, 1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 1, 1),
    "tensor count": HEAD + struct.pack("<QQ", 1 << 60, 0),
    "pair count": HEAD + struct.pack("<QQ", 0, 1 << 60),
    "key length": HEAD + struct.pack("<QQQ", 0, 1, 1 << 60) + b"\0" * 64,
    "text length": HEAD + struct.pack("<QQ", 0, 1) + text("k") + struct.pack("<IQ", 8, 1 << 63),
    "array length": HEAD
    + struct.pack("<QQ", 0, 1)
    + text("k")
    + struct.pack("<IIQ", 9, 4, 1 << 62),
    "array of texts": HEAD
    + struct.pack("<QQ", 0, 1)
    + text("k")
    + struct.pack("<IIQ", 9, 8, 1 << 62),
    "array of arrays": HEAD
    + struct.pack("<QQ", 0, 1)
    + text("k")
    + struct.pack("<IIQ", 9, 9, 1)
    + b"\0" * 64,
    "value type": HEAD + struct.pack("<QQ", 0, 1) + text("k") + struct.pack("<I", 99) + b"\0" * 8,
    "key twice": gguf([*PAIRS, PAIRS[0]]),
    "tensor twice": gguf(tensors=[*TENSORS, TENSORS[0]]),
    "tensor shape": gguf(tensors=[("t", (0, 5), 0)]),
    "half a block": gguf(tensors=[("t", (33,), 8)]),
    "alignment": gguf([*PAIRS, ("general.alignment", U32, 31)]),
    "other alignment": gguf([*PAIRS, ("general.alignment", U32, 64)]),
    "weights cut": gguf()[:-200],
    "truth": gguf().replace(b"add_bos_token\7\0\0\0\1", b"add_bos_token\7\0\0\0\2"),
    "no architecture": gguf(with_pairs(general__architecture=None)),
    "projector": gguf(with_pairs(general__architecture=("general.architecture", STRING, "clip"))),
    "adapter": gguf([*PAIRS, ("general.type", STRING, "adapter")]),
    "layers": gguf(with_pairs(llama__block_count=("llama.block_count", U64, 1 << 60))),
    "wrong type": gguf(with_pairs(llama__block_count=("llama.block_count", STRING, "2"))),
    "no weights": gguf(tensors=[]),
    "cache": gguf(
        [*PAIRS[:2], *((key, U32, (1 << 32) - 1) for key, kind, _ in PAIRS[2:7] if kind == U32)]
    ),
    "name": gguf(with_pairs(general__architecture=("general.architecture", STRING, "x" * 100_000))),
    "name in a terminal": gguf(
        with_pairs(general__architecture=("general.architecture", STRING, "\x1b[2J"))
    ),
    "long texts": gguf([*PAIRS, *((f"k{n}", STRING, "x" * 1_000_000) for n in range(9))]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_hostile_headers(file: Path, name: str) -> None:
    with pytest.raises(LoadFailed, match=r"model\.gguf"):
        describe_bytes(file, HOSTILE[name])


VOCABULARIES = {
    "types": struct.pack("<IIQ", 9, 5, 1 << 62),
    "bytes": struct.pack("<IIQ", 9, 0, 1 << 63),
    "types of a sparse file": struct.pack("<IIQ", 9, 1, 1 << 31),
    "a long text": struct.pack("<IIQQ", 9, 8, 1, 2 << 30),
    "a text beyond the file": struct.pack("<IIQQ", 9, 8, 1, 1 << 63),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_is_kept_within_bounds(file: Path, name: str) -> None:
    """Issue 11.10: a file of holes made its reader take gigabytes, or fail as if by a bug."""
    key = "token_type" if VOCABULARIES[name][4] != STRING else "tokens"
    head = HEAD + struct.pack("<QQ", 0, 1) + text(f"tokenizer.ggml.{key}")
    with file.open("wb") as writing:
        writing.write(head + VOCABULARIES[name])
        writing.truncate(3 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(LoadFailed, match=r"model\.gguf"):
            read_vocabulary(file)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_500_cut_or_flipped_copies_are_refused_or_read(file: Path) -> None:
    """Issue 2.6: damaged copies give a clear error, in little memory."""
    chance = random.Random(20)  # the same copies each time
    sound = gguf()
    header = sound.index(b"\1" * 64)
    refused = 0
    tracemalloc.start()
    try:
        for _ in range(500):
            copy = bytearray(sound)
            if chance.random() < 0.3:
                del copy[chance.randrange(len(copy)) :]
            else:
                for _ in range(chance.randrange(1, 5)):
                    copy[chance.randrange(header)] ^= 1 << chance.randrange(8)
            try:
                describe_bytes(file, bytes(copy))
            except LoadFailed:
                refused += 1
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert 250 < refused <= 500


def test_large_vocabulary_is_read_fast_and_in_little_memory(file: Path) -> None:
    words = [f"word{n}" for n in range(262_144)]
    merges = [f"a{n} b{n}" for n in range(262_144)]
    pairs = with_pairs(
        tokenizer__ggml__tokens=("tokenizer.ggml.tokens", ARRAY, (STRING, words)),
        tokenizer__ggml__merges=("tokenizer.ggml.merges", ARRAY, (STRING, merges)),
    )
    file.write_bytes(gguf(pairs))
    started = time.perf_counter()
    read_header(file)
    assert time.perf_counter() - started < 1
    tracemalloc.start()
    read_header(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_split_models_need_all_their_parts(tmp_path: Path) -> None:
    def part(number: int) -> bytes:
        own: list[Pair] = [("split.no", U32, number), ("split.count", U32, 2)]
        return gguf([*PAIRS, *own], [(f"blk.{number}.w", (64, 64), 1)])

    first, second = (tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2))
    first.write_bytes(part(0))
    with pytest.raises(LoadFailed, match=r"00002-of-00002.*missing"):
        describe(first)
    second.write_bytes(part(1))
    model = describe(first)
    assert model.parameters == 2 * 64 * 64
    assert model.size == first.stat().st_size + second.stat().st_size
    with pytest.raises(LoadFailed, match=r"first part, m-00001-of-00002\.gguf"):
        describe(second)
