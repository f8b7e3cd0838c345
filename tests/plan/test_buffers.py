"""XLA's dump of its buffers, read: what is alive when the temporary block is fullest."""

import pytest

from hvd.plan import buffers as plan_buffers

pytestmark = pytest.mark.optimised

ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, page 0, parameter 0, shape |f32[8,128]| at ShapeIndex {}, maybe-live-out:
 value: <1 param.1 @0> (size=4096,offset=0): f32[8,128]{1,0}
allocation 7: size 1600, page 0, preallocated-temp:
 value: <2 while.1{2} @0> (size=512,offset=0): bf16[4,64]{1,0}
 value: <3 carry{0} (phi) @0> (size=400,offset=512): f32[10,10]{1,0}
 value: <4 zeros @0> (size=400,offset=512): f32[10,10]{0,1}
 value: <5 copy.9 @0> (size=400,offset=912): f32[10,10]{1,0}
 value: <6 product @0> (size=256,offset=1312): f32[64]{0}
 value: <7 early @0> (size=1024,offset=512): f32[256]{0}
 value: <8 inner @0> (size=100,offset=912): u8[100]{0}
allocation 8: size 4, page 0, constant:
 value: <9 constant.1 @0> (size=4,offset=0): f32[]
"""
LIVES = """HloLiveRange (max 100):
  InstructionSequence:
    0:param.1
  BufferLiveRange:
    param.1{}:0-100
    while.1{2}:10-80
    carry{0}:40-60
    zeros{}:30-40
    copy.9{}:20-70
    product{}:45-50
    early{}:0-9
    inner{}:46-47
"""
HLO = """HloModule jit_packed
  %while.1 = (s32[], bf16[4,64]) while(%t), metadata={op_name="jit(packed)/jvp()/while" stack_frame_id=3}
  %copy.9 = f32[10,10]{1,0} copy(%param.1), metadata={op_name="jit(packed)/jvp()/while" stack_frame_id=3}
  ROOT %product = f32[64]{0} fusion(%x), metadata={op_name="jit(packed)/transpose(jvp())/dot_general"}
  %early = f32[256]{0} fusion(%x), metadata={op_name="jit(packed)/augment"}
"""
GRADIENT = plan_buffers.shape("f32", (10, 10))


@pytest.fixture
def dump(tmp_path):
    name = "module_0001.jit_packed.sm_9.0a_gpu_after_optimizations"
    (tmp_path / f"{name}-buffer-assignment.txt").write_text(ASSIGNMENT)
    (tmp_path / f"{name}-live-range.txt").write_text(LIVES)
    return tmp_path


def test_each_place_counts_once_and_by_its_origin(dump):
    found = plan_buffers.split(dump, HLO, 1600, [GRADIENT])
    # at 46: while.1 (forward), carry (a trained parameter's shape), copy.9 (the same shape, but of the forward pass: a
    # copy of the parameter), product, inner (lies within copy.9); 32 bytes of packing
    assert found is not None and found.sizes == {"gradients": 400, "activations": 512, "temporaries": 400 + 256 + 32}
    assert sum(found.sizes.values()) == 1600
    assert found.largest[:2] == [
        (512, "activations", "bf16[4,64]", "jit(packed)/jvp()/while"),
        (400, "temporaries", "f32[10,10]", "jit(packed)/jvp()/while"),
    ]


def test_the_fullest_moment(dump):
    alive = plan_buffers.fullest(plan_buffers.read(dump, 1600))
    assert {value.name for value in alive} == {"while.1{2}", "carry{0}", "copy.9", "product", "inner"}


def test_a_frozen_parameter_gathered_in_the_forward_pass_is_no_activation(dump):
    without = plan_buffers.split(dump, HLO, 1600, [], [])
    assert without is not None and without.sizes["activations"] == 512 + 300, "all of copy.9 but inner"
    found = plan_buffers.split(dump, HLO, 1600, [], [plan_buffers.shape("bf16", (10, 10))])
    assert found is not None and found.sizes["activations"] == 512 and found.sizes["gradients"] == 0


def test_no_dump_or_another_form_gives_no_split(dump, tmp_path):
    assert plan_buffers.split(tmp_path / "nothing", HLO, 1600, [GRADIENT]) is None
    assert plan_buffers.split(dump, HLO, 1234, [GRADIENT]) is None, "the block of another program"


def test_shapes_compare_without_layout_and_unit_axes():
    assert plan_buffers.shape("f32", (1, 4, 2)) == plan_buffers.shape("f32", (2, 1, 1, 4)) == ("f32", (2, 4))
