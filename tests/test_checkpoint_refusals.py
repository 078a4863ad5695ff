"""What `checkpoint.load` refuses, and what a save that fails leaves."""

import errno
import json
import multiprocessing
import os
import random
import signal
import stat
import time

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from saving import assert_identical, snapshot, trained

from steer_optim import checkpoint

# What does not fit.


def load_refused(path, optimizer, match):
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=match):
        checkpoint.load(path, optimizer)
    assert_identical(optimizer.state_dict(), before)


def test_other_optimizers_are_refused(tmp_path):
    path = tmp_path / "x"
    checkpoint.save(path, trained())
    load_refused(path, trained(torch.optim.SGD, momentum=0.9), "state of AdamW; the optimizer is SGD")
    p = [torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(()))]
    load_refused(path, torch.optim.AdamW(p[:1]), r"groups of sizes \[2\]; the optimizer has \[1\]")
    load_refused(path, torch.optim.AdamW([{"params": p[:1]}, {"params": p[1:]}]), r"the optimizer has \[1, 1\]")
    load_refused(path, torch.optim.AdamW(p[::-1]), r"0 of group 0 is a torch.float32 \(3, 2\) in .*float32 \(\)")
    q = [p[0], torch.nn.Parameter(torch.zeros((), dtype=torch.bfloat16))]
    load_refused(path, torch.optim.AdamW(q), r"parameter 1 of group 0 is a torch.float32 .* a torch.bfloat16")


def test_names_of_parameters_are_compared_where_both_have_them(tmp_path):
    path, p = tmp_path / "x", [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))]
    checkpoint.save(path, torch.optim.AdamW([("first", p[0]), ("second", p[1])]))
    load_refused(path, torch.optim.AdamW([("second", p[1]), ("first", p[0])]), "is first .*, and second")
    checkpoint.load(path, torch.optim.AdamW(p))


# What is damaged.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "x.safetensors"
    checkpoint.save(path, trained(), extra={"step": 7})
    return path


def test_any_truncated_file_is_refused(saved, tmp_path):
    data = saved.read_bytes()
    for size in {*range(24), *range(24, len(data), 61), len(data) - 1}:
        (tmp_path / "x").write_bytes(data[:size])
        load_refused(tmp_path / "x", trained(), "truncated or damaged")


def test_any_changed_byte_is_refused(saved, tmp_path):
    data = bytearray(saved.read_bytes())
    for place in range(0, len(data), 7):
        data[place] ^= 0xFF
        (tmp_path / "x").write_bytes(data)
        load_refused(tmp_path / "x", trained(), "checksum|damaged|not a safetensors file|not a checkpoint|newer")
        data[place] ^= 0xFF


EXP_AVG = "optimizer.state.0.exp_avg"


def rewritten(saved, path, edit):
    with safe_open(saved, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    edit(metadata, tensors)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    "edit",
    [
        lambda metadata, tensors: tensors[EXP_AVG][0].add_(1e-6),
        lambda metadata, tensors: tensors.pop(EXP_AVG),
        lambda metadata, tensors: tensors.update(more=torch.zeros(1)),
        lambda metadata, tensors: tensors.update({EXP_AVG: tensors[EXP_AVG].view(torch.int32)}),
        lambda metadata, tensors: tensors.update({EXP_AVG: tensors[EXP_AVG].reshape(2, 3)}),
        lambda metadata, tensors: metadata.update(structure=metadata["structure"].replace("7", "8")),
        lambda metadata, tensors: metadata.pop("structure"),
        lambda metadata, tensors: metadata.pop("sha256"),
    ],
    ids=["value", "tensor", "another", "dtype", "shape", "structure", "no structure", "no checksum"],
)
def test_altered_files_are_refused(saved, tmp_path, edit):
    load_refused(rewritten(saved, tmp_path / "x", edit), trained(), "its checksum is wrong")


def test_newer_and_foreign_files_are_refused(saved, tmp_path):
    path = rewritten(saved, tmp_path / "newer", lambda metadata, tensors: metadata.update(version="2"))
    load_refused(path, trained(), "version '2'.*upgrade")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model")
    load_refused(tmp_path / "model", trained(), "not a checkpoint of steer_optim")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "pickle")
    load_refused(tmp_path / "pickle", trained(), "not a safetensors file")
    (tmp_path / "text").write_text(json.dumps({"step": 7}))
    load_refused(tmp_path / "text", trained(), "not a safetensors file")
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "missing", trained())


# A save that fails.


@pytest.mark.parametrize("call", ["os.replace", "os.fsync", "steer_optim.checkpoint.save_file"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=type)
def test_a_failed_save_leaves_the_old_file_alone(tmp_path, monkeypatch, call, error):
    path = tmp_path / "x"
    checkpoint.save(path, trained(), extra={"step": 1})
    before = path.read_bytes()

    def fail(*args):
        if call.endswith("save_file"):
            args[1].write_bytes(b"half a")
        raise error

    monkeypatch.setattr(call, fail)
    with pytest.raises(type(error)):
        checkpoint.save(path, trained(), extra={"step": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_save_leaves_a_whole_file(tmp_path):
    path, optimizer = tmp_path / "x", torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    checkpoint.save(path, optimizer, extra={"step": 0, "tensor": torch.zeros(10**6)})
    for seed in range(6):
        before = path.stat().st_mtime_ns
        child = os.fork()
        if child == 0:
            try:
                for step in range(1, 10**6):
                    checkpoint.save(path, optimizer, extra={"step": step, "tensor": torch.full((10**6,), step)})
            finally:
                os._exit(1)
        try:
            deadline = time.monotonic() + 30
            while path.stat().st_mtime_ns == before:
                assert time.monotonic() < deadline, "no save was ever finished: nothing was replaced"
                time.sleep(1e-3)
            time.sleep(random.Random(seed).uniform(0, 0.1))  # a save takes about as long: somewhere in the next one
        finally:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child ended by itself: it tested nothing"
        extra = checkpoint.load(path, optimizer)
        assert (extra["tensor"] == extra["step"]).all()


def test_a_missing_directory_is_named(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(FileNotFoundError, match="no directory"):
        checkpoint.save(tmp_path / "missing" / "optimizer.safetensors", optimizer)


# What other processes, the disk and other hands do to a file.


def saving_forever(path, stop):
    torch.manual_seed(1)
    optimizer = trained()
    while not stop.exists():
        checkpoint.save(path, optimizer, extra={"step": time.time()})


def test_a_load_while_another_process_saves_succeeds(tmp_path):
    path, stop = tmp_path / "x", tmp_path / "stop"
    checkpoint.save(path, trained(), extra={"step": 0.0})
    saver = multiprocessing.get_context("forkserver").Process(target=saving_forever, args=(path, stop))
    saver.start()
    try:
        optimizer, steps, end = trained(), set(), time.time() + 20
        while len(steps) < 40 and time.time() < end:
            steps.add(checkpoint.load(path, optimizer)["step"])
    finally:
        stop.touch()
        saver.join()
    assert len(steps) > 10  # they are of many saves


def test_a_file_that_is_replaced_between_two_looks_is_looked_at_again(tmp_path, monkeypatch):
    path, optimizer = tmp_path / "x", trained()
    checkpoint.save(path, optimizer, extra={"step": 1})
    good, calls = path.read_bytes(), []
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    read = checkpoint._read_once

    def replaced(path):
        calls.append(path)
        try:
            return read(path)
        finally:
            other = path.with_name("other")
            other.write_bytes(good)
            os.replace(other, path)

    monkeypatch.setattr(checkpoint, "_read_once", replaced)
    assert checkpoint.load(path, optimizer)["step"] == 1
    assert len(calls) == 2


def save_on_a_full_disk(path, answers):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    try:
        checkpoint.save(path, trained(), extra={"large": torch.zeros(2**20)})
        answers.put((0, "", "saved"))
    except OSError as error:
        answers.put((error.errno, error.filename, str(error)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits of a process")
def test_a_disk_that_is_full_is_an_oserror_with_the_path(tmp_path):
    path = tmp_path / "x"
    checkpoint.save(path, trained(), extra={"step": 1})
    before = path.read_bytes()
    answers = multiprocessing.get_context("forkserver").SimpleQueue()
    process = multiprocessing.get_context("forkserver").Process(target=save_on_a_full_disk, args=(path, answers))
    process.start()
    process.join()
    assert process.exitcode == 0
    number, filename, message = answers.get()
    assert number == errno.EFBIG
    assert filename == str(path)
    assert "could not save, and changed nothing" in message
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(("text", "kind"), [("os error 28", OSError), ("os error 13", PermissionError)])
def test_errors_of_safetensors_are_those_of_the_system(tmp_path, monkeypatch, text, kind):
    def full(*_):
        raise SafetensorError(f"Error while serializing: I/O error: something ({text})")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(kind, match="could not save") as raised:
        checkpoint.save(tmp_path / "x", trained())
    assert raised.value.errno == int(text.split()[-1])
    assert raised.value.filename == str(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_file_that_may_not_be_read_is_not_missing(tmp_path, monkeypatch):
    path = tmp_path / "x"
    checkpoint.save(path, trained())

    def refused(self, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "open", refused)
    with pytest.raises(PermissionError):
        checkpoint.load(path, trained())


def test_saving_through_a_link_writes_its_target(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    for step in range(2):
        checkpoint.save(link, trained(), extra={"step": step})
        assert link.is_symlink()
        assert checkpoint.load(target, trained())["step"] == step


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_is_that_of_the_umask_or_of_the_file_that_was_there(tmp_path, umask):
    path, before = tmp_path / "x", os.umask(umask)
    try:
        checkpoint.save(path, trained())
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
        path.chmod(0o640)
        checkpoint.save(path, trained())
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_directory_that_cannot_be_flushed_is_no_failure(tmp_path, monkeypatch):
    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.save(tmp_path / "x", trained(), extra={"step": 1})
    assert checkpoint.load(tmp_path / "x", trained())["step"] == 1


def signed_again(path, change):
    """The file with another structure and a checksum that fits it."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    structure = change(metadata["structure"])
    digest = checkpoint._digest(structure, tensors)
    save_file(tensors, path, {**metadata, "structure": structure, "sha256": digest})


SIGNED = {
    "no optimizer": lambda s: json.dumps({k: v for k, v in json.loads(s).items() if k != "optimizer"}),
    "an empty optimizer": lambda s: json.dumps({**json.loads(s), "optimizer": {"dict": []}}),
    "no parameters": lambda s: json.dumps({**json.loads(s), "parameters": 7}),
    "a tensor that is not there": lambda s: json.dumps(
        with_tensors(json.loads(s), lambda n, strides: [n + "?", strides])
    ),
    "another kind": lambda s: s.replace('"tuple"', '"set"').replace('{"tensor"', '{"array"'),
    "deep": lambda s: s[:-1] + ', "extra": ' + "[" * 10**5 + "]" * 10**5 + "}",
    "no JSON": lambda s: s[:-1],
    "extra that is a list": lambda s: json.dumps({**json.loads(s), "extra": []}),
    "huge strides": lambda s: json.dumps(with_tensors(json.loads(s), lambda n, strides: [n, [10**9] * len(strides)])),
}


def with_tensors(value, change):
    if isinstance(value, dict):
        return {key: change(*v) if key == "tensor" else with_tensors(v, change) for key, v in value.items()}
    return [with_tensors(item, change) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("change", SIGNED.values(), ids=SIGNED)
def test_a_file_that_was_signed_again_after_tampering_is_a_valueerror(saved, tmp_path, change):
    path = tmp_path / "x"
    path.write_bytes(saved.read_bytes())
    signed_again(path, change)
    load_refused(path, trained(), "was altered|holds the state|sizes")


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match="is not a regular file"):
        checkpoint.save(path, trained())
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ("x" * 250)
    checkpoint.save(path, trained(), extra={"step": 1})
    assert checkpoint.load(path, trained())["step"] == 1


def test_a_path_that_safetensors_cannot_open_is_refused_before_it_is_written(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff")
    for use in (checkpoint.save, checkpoint.load):
        with pytest.raises(OSError, match="only paths that are valid UTF-8"):
            use(path, trained())
    assert not list(tmp_path.iterdir())
