"""Checkpoints that TensorFlow wrote are read exactly; damaged and odd ones give one line, whatever byte is wrong."""

import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import tf_bundles

from electra_jax.config import UserError
from electra_jax.interop import bundle


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The unpacked fixtures by name; tests that change files copy them first."""
    root = tmp_path_factory.mktemp("tf1")
    return {name: tf_bundles.unpack(name, root) for name in ("electra", "nvidia", "sliced", "types")}


def refusal(call, *arguments):
    """The message of the UserError, which must be one line."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def copy(folder, to):
    return shutil.copytree(folder, to / "copy")


# --- What TensorFlow wrote ----------------------------------------------------------------------


def test_every_type_shape_and_shard_is_read_as_tensorflow_wrote_it(folders):
    found = bundle.read_bundle(folders["types"] / "two")
    expected = tf_bundles.TYPES | {name: ("float32", ()) for name in tf_bundles.LONG_NAMES}
    assert found.keys() == expected.keys()
    for name, (dtype, shape) in expected.items():
        assert found[name].dtype == dtype and found[name].shape == shape, name
        np.testing.assert_array_equal(found[name], tf_bundles.values(name, shape, dtype), err_msg=name)


def test_the_long_index_has_several_blocks_and_both_shards_hold_tensors(folders):
    # TensorFlow starts a new block after 256 KiB.
    assert (folders["types"] / "two.index").stat().st_size > 270_000
    files = {entry.file.name for entry in bundle.read_index(folders["types"] / "two").values()}
    assert files == {"two.data-00000-of-00002", "two.data-00001-of-00002"}


def test_only_the_named_tensors_are_read(folders, tmp_path):
    folder = copy(folders["types"], tmp_path)
    (folder / "two.data-00001-of-00002").unlink()
    index = bundle.read_index(folder / "two")
    here = [name for name, entry in index.items() if "00000-of" in entry.file.name]
    assert list(bundle.read_bundle(folder / "two", here)) == here


def test_strings_are_left_out_unless_asked_for(folders):
    prefix = folders["nvidia"] / "ckpt-77"
    graph = "_CHECKPOINTABLE_OBJECT_GRAPH"
    assert graph in bundle.read_index(prefix)
    found = bundle.read_bundle(prefix)
    assert graph not in found and len(found) == len(bundle.read_index(prefix)) - 1
    assert found["step/.ATTRIBUTES/VARIABLE_VALUE"] == 77
    assert "is text" in refusal(bundle.read_bundle, prefix, [graph])


def test_a_partitioned_variable_is_refused_and_its_neighbours_are_read(folders):
    prefix = folders["sliced"] / "model.ckpt"
    assert bundle.read_index(prefix).keys() == {"parts", "whole"}
    np.testing.assert_array_equal(bundle.read_bundle(prefix, ["whole"])["whole"], tf_bundles.values("whole", (4,)))
    assert "parts is partitioned" in refusal(bundle.read_bundle, prefix)


@pytest.mark.parametrize("length", [*range(130), 4095, 70_001])
def test_crc32c_is_castagnolis(length):
    octets = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)
    assert bundle._mask(bundle.crc32c(octets)) == tf_bundles.crc32c(octets.tobytes())


def test_crc32c_of_the_standards_check_string():
    assert bundle.crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283


# --- Which checkpoint ---------------------------------------------------------------------------


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.index").touch()
    return folder


@pytest.mark.parametrize("ending", ["", ".index", ".meta", ".data-00000-of-00001"])
def test_a_prefix_or_any_of_its_files_means_the_prefix(folders, ending):
    prefix = str(folders["electra"] / "model.ckpt-123")
    assert bundle.find_prefix(prefix + ending) == prefix


def test_a_folder_means_the_checkpoint_that_its_checkpoint_file_names(folders, tmp_path):
    folder = copy(folders["electra"], tmp_path)
    touch(folder, "model.ckpt-9999", "model é-5")
    assert bundle.find_prefix(folder) == str(folder / "model.ckpt-123")
    moved = 'model_checkpoint_path: "/old/machine/model.ckpt-123"\nall_model_checkpoint_paths: "model.ckpt-9999"\n'
    (folder / "checkpoint").write_text(moved)
    assert bundle.find_prefix(folder) == str(folder / "model.ckpt-123")
    (folder / "checkpoint").write_text('model_checkpoint_path: "model \\303\\251-5"')
    assert bundle.find_prefix(folder) == str(folder / "model é-5")
    (folder / "checkpoint").write_text('model_checkpoint_path: "gone-7"')
    assert "gone-7, which is not there" in refusal(bundle.find_prefix, folder)


def test_without_a_checkpoint_file_the_only_or_the_newest_one_counts(tmp_path):
    assert bundle.find_prefix(touch(tmp_path / "one", "electra_small")).endswith("one/electra_small")
    numbered = touch(tmp_path / "many", "model.ckpt-9", "model.ckpt-100", "model.ckpt-20")
    assert bundle.find_prefix(numbered).endswith("many/model.ckpt-100")


def test_no_checkpoint_or_no_telling_which_is_an_error(tmp_path):
    assert "has no file *.index" in refusal(bundle.find_prefix, tmp_path)
    assert "several checkpoints" in refusal(bundle.find_prefix, touch(tmp_path / "a", "x-1", "y-2"))
    assert "several checkpoints" in refusal(bundle.find_prefix, touch(tmp_path / "b", "x-1", "x"))
    assert "nothing.index does not exist" in refusal(bundle.find_prefix, tmp_path / "nothing")


# --- Damage -------------------------------------------------------------------------------------


def test_any_flipped_bit_of_the_index_changes_nothing_or_is_an_error(folders, tmp_path):
    prefix = copy(folders["electra"], tmp_path) / "model.ckpt-123"
    file = Path(f"{prefix}.index")
    whole, good = file.read_bytes(), bundle.read_index(prefix)
    rng = random.Random(0)
    refused = 0
    places = [(at, rng.randrange(8)) for at in rng.sample(range(len(whole) - 48), 250)]
    footer = [(at, bit) for at in range(len(whole) - 48, len(whole)) for bit in range(8)]    # has no checksum
    for at, bit in places + footer:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        try:
            assert bundle.read_index(prefix) == good, at
        except UserError as error:
            assert "\n" not in str(error) and "copy it again" in str(error)
            refused += 1
    assert refused > 250 + 8 * 8    # most of the footer is filling that means nothing


def test_nonsense_under_a_right_checksum_is_still_no_other_exception(tmp_path):
    rng = random.Random(1)
    x = np.ones((3, 2), np.float32)
    tf_bundles.write(tmp_path / "x", {name: x for name in ("a", "b/c", "d")})
    items = list(bundle._table((tmp_path / "x.index").read_bytes()))
    refused = 0
    for _ in range(700):
        changed = [(key, bytearray(value)) for key, value in items]
        for _ in range(rng.randint(1, 3)):
            value = rng.choice(changed)[1]
            value[rng.randrange(len(value))] = rng.randrange(256)
        (tmp_path / "x.index").write_bytes(tf_bundles.table([(key, bytes(value)) for key, value in changed]))
        try:
            assert bundle.read_bundle(tmp_path / "x").keys() <= {"a", "b/c", "d"}
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 250


def test_a_flipped_bit_of_the_data_is_found_and_the_tensor_named(folders, tmp_path):
    prefix = copy(folders["electra"], tmp_path) / "model.ckpt-123"
    name = "electra/encoder/layer_1/output/dense/kernel"
    entry = bundle.read_index(prefix)[name]
    with open(entry.file, "r+b") as file:
        file.seek(entry.offset + entry.size - 1)
        last = file.read(1)[0]
        file.seek(entry.offset + entry.size - 1)
        file.write(bytes([last ^ 4]))
    assert f"the checksum of {name} differs" in refusal(bundle.read_bundle, prefix)
    assert bundle.read_bundle(prefix, ["global_step"])["global_step"] == 123


@pytest.mark.parametrize("keep", [0, 8, 47, 1000, 7000])
def test_a_cut_index_is_an_error(folders, tmp_path, keep):
    prefix = copy(folders["electra"], tmp_path) / "model.ckpt-123"
    file = Path(f"{prefix}.index")
    file.write_bytes(file.read_bytes()[:keep])
    assert "is damaged, or not of a TensorFlow checkpoint" in refusal(bundle.read_bundle, prefix)


def test_cut_or_missing_data_are_errors_that_name_the_file(folders, tmp_path):
    folder = copy(folders["types"], tmp_path)
    file = folder / "two.data-00001-of-00002"
    file.write_bytes(file.read_bytes()[:-3])
    assert "two.data-00001-of-00002 ends before" in refusal(bundle.read_bundle, folder / "two")
    file.unlink()
    assert "two.data-00001-of-00002 cannot be read" in refusal(bundle.read_bundle, folder / "two")


def test_what_is_no_bundle_is_an_error(tmp_path):
    (tmp_path / "text.index").write_text("a page of text " * 100)
    assert "not of a TensorFlow checkpoint" in refusal(bundle.read_bundle, tmp_path / "text")
    assert "cannot be read" in refusal(bundle.read_bundle, tmp_path / "none")


# --- Odd bundles --------------------------------------------------------------------------------


def test_the_writer_of_these_tests_writes_what_is_read(tmp_path):
    tensors = {name: tf_bundles.values(name, (3, 5)) for name in ("a", "b/c")}
    tf_bundles.write(tmp_path / "x{}", tensors)
    np.testing.assert_equal(bundle.read_bundle(tmp_path / "x{}"), tensors)


def test_odd_bundles_are_refused_with_the_reason(tmp_path):
    x = np.ones((2, 3), np.float32)
    octets = x.tobytes()

    def why(value=x, **options):
        tf_bundles.write(tmp_path / "x", {"a": value}, **options)
        (tmp_path / "x.data-00000-of-00001").write_bytes(octets)
        return refusal(bundle.read_bundle, tmp_path / "x")

    assert "big-endian" in why(header=tf_bundles.message(f1=1, f2=1))
    assert "compressed (Snappy)" in why(compression=1)
    assert "type number 8" in why(tf_bundles.entry((2, 3), 0, octets, dtype=8))    # complex64
    assert "a has 24 bytes, not those of float32 (2, 4)" in why(tf_bundles.entry((2, 4), 0, octets))
    assert "a has 0 bytes" in why(tf_bundles.entry((0, 1 << 62, 1 << 62), 0, b""))
    assert "a has 0 bytes" in why(tf_bundles.entry((0, 1 << 65), 0, b""))
    assert "a has 24 bytes" in why(tf_bundles.entry((6, *[1] * 80), 0, octets))
    assert "a field is out of bounds" in why(tf_bundles.entry((2, 3), 0, octets)[:-2])
    # A size beyond any memory is refused before anything of it is allocated.
    size = 1 << 50
    huge = tf_bundles.message(f1=1, f2=tf_bundles.message(f2=tf_bundles.message(f1=size // 4)), f5=size, f6=(0,))
    assert "ends before a" in why(huge)


def test_an_index_without_a_header_or_the_wanted_name_is_refused(tmp_path):
    tf_bundles.write(tmp_path / "x", {"a": np.zeros(2, np.float32)})
    assert "has no variable b" in refusal(bundle.read_bundle, tmp_path / "x", ["b"])
    for items in ([], [(b"a", tf_bundles.message(f1=1))]):
        (tmp_path / "x.index").write_bytes(tf_bundles.table(items))
        assert "is damaged" in refusal(bundle.read_index, tmp_path / "x")


def test_an_index_whose_keys_are_out_of_bounds_is_refused(tmp_path):
    header = b"\0\0\2" + tf_bundles.message(f1=1)
    for entry in (b"\x05\x01\x00a", b"\x00\x7f\x00a", b"\x00\x01\x7fa", b"\xff" * 12):
        body = header + entry + struct.pack("<II", 0, 1) + b"\0"
        data = body + struct.pack("<I", tf_bundles.crc32c(body))
        top = tf_bundles.block([(b"x", tf_bundles.varint(0) + tf_bundles.varint(len(data) - 5))])
        footer = b"\0\0" + tf_bundles.varint(len(data)) + tf_bundles.varint(len(top) - 5)
        (tmp_path / "x.index").write_bytes(data + top + footer.ljust(40, b"\0") + struct.pack("<Q", bundle._MAGIC))
        assert "is damaged" in refusal(bundle.read_index, tmp_path / "x")
