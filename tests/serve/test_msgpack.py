"""openpi's msgpack form, both ways with openpi's own packer, and hostile bytes."""

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from openpi_client import msgpack_numpy as theirs

from hvd.serve import msgpack as ours

DTYPES = st.one_of(
    arrays.boolean_dtypes(),
    arrays.integer_dtypes(endianness="?"),
    arrays.unsigned_integer_dtypes(endianness="?"),
    arrays.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    arrays.unicode_string_dtypes(endianness="?", min_len=1, max_len=5),
)
ARRAYS = DTYPES.flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=40),
    st.binary(max_size=40),
)
KEYS = st.one_of(st.text(max_size=8), st.binary(max_size=8).filter(lambda key: not key.startswith(b"__")))
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=20,
)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, np.ndarray | np.generic):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or a != a


@given(array=ARRAYS, order=st.sampled_from(["C", "F", "stepped"]))
def test_arrays_go_both_ways_with_the_clients_packer(array, order):
    if order == "F":
        array = np.asfortranarray(array)
    if order == "stepped" and array.ndim:
        array = array[::-1]
    for unpacked in (ours.unpack(theirs.packb({"x": array})), theirs.unpackb(ours.pack({"x": array}))):
        assert unpacked["x"].dtype == array.dtype and unpacked["x"].shape == array.shape
        np.testing.assert_array_equal(unpacked["x"], array)


# UTF-8 has no half of a surrogate pair: openpi's packer cannot send one
@given(DTYPES.flatmap(lambda dtype: arrays.from_dtype(dtype, alphabet=st.characters(codec="utf-8"))))
def test_scalars_go_both_ways(scalar):
    # the packer sends numpy's own float64 and text as plain ones
    assert_same(ours.unpack(theirs.packb(scalar)), theirs.unpackb(theirs.packb(scalar)))
    assert_same(theirs.unpackb(ours.pack(scalar)), theirs.unpackb(theirs.packb(scalar)))


@given(VALUES)
def test_everything_else_is_read_as_msgpack_reads_it(value):
    assert_same(ours.unpack(msgpack.packb(value)), value)
    assert ours.pack(value) == theirs.packb(value)


@given(st.floats(width=32))
def test_single_precision_numbers(value):
    assert_same(ours.unpack(msgpack.packb(value, use_single_float=True)), value)


@given(count=st.sampled_from([0, 15, 16, 31, 32, 255, 256, 65_535, 65_536]))
@settings(deadline=None)
def test_long_texts_and_bytes_of_every_length_code(count):
    for value in ("x" * count, b"x" * count, list(range(min(count, 4_000)))):
        assert_same(ours.unpack(msgpack.packb(value)), value)


@given(st.binary(max_size=200))
@settings(max_examples=1_000)
def test_any_bytes_are_read_as_msgpack_reads_them_or_refused(data):
    try:
        found = ours.unpack(data)
    except ours.Malformed as error:
        assert "\n" not in str(error)
    else:
        if b"__nd" not in data and b"__np" not in data:
            assert_same(found, msgpack.unpackb(data, strict_map_key=False))


@given(st.data())
@settings(max_examples=300)
def test_a_damaged_message_is_read_or_refused(data):
    """One byte changed, or cut anywhere: never another exception, never a huge array."""
    message = bytearray(theirs.packb({"state": np.arange(5.0), "x": np.float32(3), "t": np.array("ab"), "l": [1, "é"]}))
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] = data.draw(st.integers(0, 255))
    message = bytes(message)[: data.draw(st.integers(1, len(message)))]
    try:
        ours.unpack(message)
    except ours.Malformed as error:
        assert "\n" not in str(error)


def array(data=b"\0" * 8, dtype="<f4", shape=(2,)) -> Any:
    return msgpack.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": list(shape)})


@pytest.mark.parametrize(
    "message, why",
    [
        (array(dtype="|O"), "dtype '|O' of an array"),
        (array(dtype="O"), "dtype 'O' of an array"),
        (array(dtype="|V8"), "dtype '|V8'"),
        (array(dtype="<c8"), "dtype '<c8'"),
        (array(dtype="<f4,<f4"), "dtype '<f4,<f4'"),
        (array(dtype="<M8[s]"), "dtype"),
        (array(dtype="<U0", data=b""), "dtype '<U0'"),
        (array(dtype="<f4\n"), "dtype"),
        (array(dtype=[["a", "<f4"]]), "dtype"),
        (array(shape=(3,)), r"shape \[3\] and dtype float32 does not have 8 bytes"),
        (array(shape=(-2, -1)), "shape is not a list"),
        (array(shape=(2**40,)), "does not have 8 bytes"),
        (array(shape=(2**32, 2**32, 2**32, 0), data=b""), "array of shape"),
        (array(shape=(2.0,)), "shape is not a list"),
        (array(shape=(True, 2)), "shape is not a list"),
        (array(shape=(1,) * 9, data=b"\0" * 4), "at most 8 lengths"),
        (array(data="text"), "data is not binary"),
        (array(data=[0, 0]), "data is not binary"),
        (array(dtype="<U2", data=b"\xff" * 8, shape=(1,)), "no character"),
        (msgpack.packb({b"__ndarray__": True}), "dtype 'None'"),
        (msgpack.packb({b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}), "holds a str"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}), "does not hold 300"),
        (msgpack.packb({b"__npgeneric__": True, b"data": True, b"dtype": "<i4"}), "holds a bool"),
        (b"", "cut off"),
        (b"\xdd\xff\xff\xff\xff", "exceeds max_"),
        (b"\xdf\xff\xff\xff\xff", "exceeds max_"),
        (b"\xc6\xff\xff\xff\xff", "cut off"),
        (b"\xc1", "no msgpack"),
        (b"\xa1\xff", "not UTF-8"),
        (b"\x01\x02", "1 bytes follow"),
        (msgpack.packb(msgpack.ExtType(4, b"x")), "max_ext_len"),
        (msgpack.packb(msgpack.ExtType(4, b"")), "extension type"),
        (msgpack.packb(msgpack.Timestamp(1)), "max_ext_len"),
        (b"\x91" * 60_000 + b"\x01", "nested too deeply"),
        (b"\x81\xa1x" * 60_000 + b"\x01", "nested too deeply"),
        (msgpack.packb([[0] * 300] * 300), "more than 20000 values"),
        (msgpack.packb([0] * 5_000), "a list that is too long"),
        (b"\xdd\x00\x00\x10\x00" * 900 + b"\xc0" * 5_000, "cut off"),
        (array(dtype="<U1", data=b"\x00\xd8\x00\x00", shape=(1,)), "no character"),
        (
            msgpack.packb({b"nd": True, b"type": "<f4", b"shape": [2], b"data": b"\0" * 8}),
            "openpi_client.msgpack_numpy",
        ),
        (
            msgpack.packb({"__ndarray__": True, "data": b"", "dtype": "<f4", "shape": [0]}),
            "openpi_client.msgpack_numpy",
        ),
        (b"\x82\xa1x\x01\xa1x\x02", "a key is there twice"),
        (b"\x81\x01\x01", "a map's key is a int"),
        (b"\x81\x90\x01", "a map's key is a list"),
        (b"".join([b"\x81", array(), b"\x01"]), "a map's key is a ndarray"),
    ],
)
def test_what_is_refused(message, why):
    with pytest.raises(ours.Malformed, match=why):
        ours.unpack(message)


def test_a_bool_of_another_byte_is_true():
    assert ours.unpack(array(b"\0\1\2\xff", "|b1", (4,))).tolist() == [False, True, True, True]


def test_arrays_are_read_only():
    found = ours.unpack(theirs.packb(np.zeros(1_000_000, np.uint8)))
    assert not found.flags.writeable


@pytest.mark.parametrize("value", [np.array([object()]), np.zeros(2, np.complex64), object(), np.zeros(1, "V4")])
def test_what_cannot_be_packed(value):
    with pytest.raises(TypeError, match="cannot be sent"):
        ours.pack({"x": value})
