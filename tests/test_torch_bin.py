"""torch's state dicts read without torch: equal to what torch wrote, and nothing in a file is ever run."""

import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from electra_jax.config import UserError
from electra_jax.interop import torch_bin

DATA = Path(__file__).parent / "data/huggingface"
FILES = ("zip.bin", "legacy.bin", "wrapped.bin")   # wrapped.bin: {"step": 7, ..., "model": state dict}, protocol 4


@pytest.mark.parametrize("file", FILES)
def test_tensors_are_those_that_torch_saved(file):
    ours = torch_bin.read(DATA / file)
    theirs = np.load(DATA / "state_dict.npz")
    assert set(ours) == set(theirs.files)
    for name in theirs.files:
        expected = theirs[name]
        assert ours[name].dtype.name == ("bfloat16" if name == "bfloat16" else expected.dtype.name)
        np.testing.assert_array_equal(ours[name].astype(expected.dtype), expected, strict=True, err_msg=name)
    assert np.shares_memory(ours["shared"], ours["part"]) and ours["part"].shape == (3, 2)
    with pytest.raises(ValueError):
        ours["shared"][0, 0] = 1   # a tied table would change with it


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def legacy(tree):
    header = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(x, 2) for x in (*header, tree, []))


def write(path, tree, protocol=2, zipped=True):
    if not zipped:
        path.write_bytes(legacy(tree))
        return path
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps(tree, protocol))
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function, name", [(os.system, os.system.__module__ + ".system"), (eval, "builtins.eval")])
def test_a_pickle_with_code_is_refused_by_name_and_does_not_run(tmp_path, function, name, zipped):
    marker = tmp_path / "marker"
    argument = f"touch '{marker}'" if function is os.system else f"open({str(marker)!r}, 'w')"
    path = write(tmp_path / "m.bin", {"w": Malicious(function, argument)}, zipped=zipped)
    with pytest.raises(UserError, match="pickles with code are refused") as error:
        torch_bin.read(path)
    assert name.replace("builtins", "__builtin__") in str(error.value)   # protocol 2 writes Python 2's names
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malicious(function, argument)))
    assert marker.exists()   # so the assertion above can fail


@pytest.mark.parametrize("pickled", [
    b"\x80\x02cposix\nsystem\nX\x01\x00\x00\x00x\x85R.", b"\x80\x02(X\x01\x00\x00\x00xiposix\nsystem\n.",
    b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01x\x85R.", b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    b"\x80\x02\x82\x01.", b"\x80\x02}}]X\x01\x00\x00\x00xs.", b"\x80\x02ctorch\nFloatStorage\n)R.",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", b"\x80\x02}((tK\x00u.", b"\x80\x02}K\x01K\x02s.",
    b"\x80\x02X\x01\x00\x00\x00x)R."],
    ids=["GLOBAL", "INST", "STACK_GLOBAL", "NEWOBJ", "EXT1", "list_as_key", "call_of_a_type", "state_of_a_function",
         "tuple_as_key", "number_as_key", "call_of_a_string"])
def test_no_other_instruction_of_a_pickle_is_followed(tmp_path, pickled):
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as archive:
        archive.writestr("m/data.pkl", pickled)
    with pytest.raises(UserError, match=r"refused|damaged"):
        torch_bin.read(tmp_path / "m.bin")



def write_tensor(path, offset, size, stride, values=4, stored=None):
    """A zip of one float32 tensor with any geometry, over `values` elements of which `stored` are there."""
    def text(s):
        return b"X" + len(s).to_bytes(4, "little") + s

    def numbers(items):
        return b"(" + b"".join(b"J" + i.to_bytes(4, "little", signed=True) for i in items) + b"t"

    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K%ct" % values + b"Q"
    tensor = (b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"J" + offset.to_bytes(4, "little", signed=True)
              + numbers(size) + numbers(stride) + b"\x89NtR")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}" + text(b"w") + tensor + b"s.")
        archive.writestr("m/data/0", np.arange(stored or values, dtype=np.float32).tobytes())
    return path


@pytest.mark.parametrize("offset, size, stride, stored", [
    (1, (4,), (1,), 4), (0, (2, 3), (3, 1), 4), (0, (2,), (4,), 4), (-1, (1,), (1,), 4), (0, (2,), (-1,), 4),
    (0, (-1,), (1,), 4), (0, (2,), (1, 1), 4), (0, (2**30, 2**30, 2**30), (0, 0, 0), 4), (0, (4,), (1,), 3),
    (0, (1,), (1,), 5)])
def test_a_tensor_reaches_no_further_than_its_storage(tmp_path, offset, size, stride, stored):
    good = torch_bin.read(write_tensor(tmp_path / "m.bin", 1, (2, 2), (1, 1)))["w"]
    np.testing.assert_array_equal(good, [[1, 2], [2, 3]])
    with pytest.raises(UserError, match="damaged"):
        torch_bin.read(write_tensor(tmp_path / "m.bin", offset, size, stride, stored=stored))


@pytest.mark.parametrize("content, message", [
    (b"", "damaged"), (b"PK\3\4", "damaged"), (b"version https://git-lfs", "damaged"), (legacy([1]), "damaged"),
    (legacy({"step": 3}), "has no tensors"), (legacy({"model": {"a": 1}}), "has no tensors")],
    ids=["empty", "zip_magic", "text", "list", "numbers", "no_tensors_within"])
def test_what_is_no_state_dict_is_named_in_one_line(tmp_path, content, message):
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        torch_bin.read(tmp_path / "m.bin")
    assert "\n" not in str(error.value) and str(tmp_path / "m.bin") in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        torch_bin.read(tmp_path / "absent.bin")


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_an_error_of_one_line_or_still_readable(tmp_path, file):
    content, path, rng = (DATA / file).read_bytes(), tmp_path / "m.bin", random.Random(0)
    refused = 0
    for trial in range(600):
        damaged = bytearray(content)
        if trial % 3 == 2:
            del damaged[rng.randrange(len(content)):]
        for _ in range(1 + trial % 4):
            if damaged:
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert torch_bin.read(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 500
    assert refused > 300


def rewrite(path, byteorder="little", compression=zipfile.ZIP_STORED):
    """zip.bin again, with another mark of the byte order or compressed."""
    with zipfile.ZipFile(DATA / "zip.bin") as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, byteorder if name.endswith("/byteorder") else old.read(name))
    return path


def test_files_of_big_endian_machines_and_compressed_ones_are_refused(tmp_path):
    assert torch_bin.read(rewrite(tmp_path / "m.bin"))
    with pytest.raises(UserError, match="big-endian"):
        torch_bin.read(rewrite(tmp_path / "m.bin", byteorder="big"))
    with pytest.raises(UserError, match="compressed"):
        torch_bin.read(rewrite(tmp_path / "m.bin", compression=zipfile.ZIP_DEFLATED))
    content = (DATA / "legacy.bin").read_bytes()
    at = content.index(b"little_endian") + len("little_endian") + 2   # the name is put into the memo: q, number
    (tmp_path / "m.bin").write_bytes(content[:at] + content[at:].replace(b"\x88", b"\x89", 1))
    with pytest.raises(UserError, match="big-endian"):
        torch_bin.read(tmp_path / "m.bin")


def test_a_flipped_bit_in_a_tensor_is_noticed_by_the_archives_checksum(tmp_path):
    content = bytearray((DATA / "zip.bin").read_bytes())
    values = torch_bin.read(DATA / "zip.bin")["double"].tobytes()
    content[content.index(values)] ^= 1
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(UserError, match="CRC"):
        torch_bin.read(tmp_path / "m.bin")


def test_torch_of_this_machine_writes_what_is_read(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = {"a": torch.randn(7, 3), "b": torch.randn(2, 5).T, "c": torch.tensor(True)}
    for options in ({}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 5}):
        torch.save(tensors, tmp_path / "m.bin", **options)
        for name, x in torch_bin.read(tmp_path / "m.bin").items():
            np.testing.assert_array_equal(x, tensors[name].numpy(), strict=True)
