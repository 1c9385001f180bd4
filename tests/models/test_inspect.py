from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from tests.models.builders import TENSORS, gguf

from headrace.core.errors import LoadFailed
from headrace.models.inspect import inspect


def test_a_file_and_a_folder_with_one_model_are_the_same(tmp_path: Path) -> None:
    """W22: what a path holds is told without an engine."""
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf())
    (tmp_path / "mmproj-m.gguf").write_bytes(b"GGUF")
    assert inspect(tmp_path) == inspect(file)
    (tmp_path / "n.gguf").write_bytes(gguf())
    with pytest.raises(LoadFailed, match=r"name one: m\.gguf, n\.gguf"):
        inspect(tmp_path)


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(gguf(tensors=TENSORS[:1]))
    link = tmp_path / "m.gguf"
    link.symlink_to("blob")
    assert inspect(link).parameters == 64 * 50


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gguf", b"", "empty"),
        ("a.gguf", b"nonsense", "6e 6f 6e"),
        ("a.gguf", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.gguf", b"<!DOCTYPE html>", "web page"),
        ("a.gguf", b"tjgg\1\0", "before GGUF"),
        ("a.bin", b"anything", "pickle"),
        ("a.gguf", b"\x80\x04\x95", "pickle"),
        ("a.gguf", b"PK\3\4....", "zip"),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{}", "config.json"),
    ],
)
def test_says_what_the_file_is_instead(tmp_path: Path, name, content, message) -> None:
    """W2: an unknown format is an error, never a guess; pickles are refused."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LoadFailed, match=message):
        inspect(tmp_path / name)


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="neither GGUF nor safetensors"):
        inspect(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\2")
    with pytest.raises(LoadFailed, match="pickle"):
        inspect(tmp_path)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    """Issue 2.6: a pipe, a socket, a device and nothing at all never hang."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, what in (("pipe", "a pipe"), ("socket", "a socket")):
            with pytest.raises(LoadFailed, match=what):
                inspect(tmp_path / name)
    with pytest.raises(LoadFailed, match="a device"):
        inspect(Path("/dev/zero"))
    with pytest.raises(LoadFailed, match="No such file"):
        inspect(tmp_path / "nothing")
    with pytest.raises(LoadFailed):
        inspect(Path("a\0b"))


def test_unreadable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf())

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    # The superuser may read everything, so the system's answer is played.
    monkeypatch.setattr("headrace.models.files.os.open", refuse)
    with pytest.raises(LoadFailed, match="Permission denied"):
        inspect(tmp_path / "m.gguf")
