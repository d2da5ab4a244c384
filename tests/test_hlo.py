"""Compiled programs as XLA writes them for different platforms, read by `fax.inspect`."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from fax.inspect._collectives import collectives
from fax.inspect._cycles import cycles
from fax.inspect._flops import flops
from fax.inspect._groups import Devices
from fax.inspect._hlo import arrays, parse
from fax.inspect._loops import Total, runs


def mesh(slices=1, offset=100_000, **axes):
    """Stands for a mesh of described devices, numbered as those of TPU slices are."""
    sizes = list(axes.values())
    own = np.prod(sizes) // slices
    pairs = [(n, (n + 1) * offset * (slices > 1) + i) for n in range(slices) for i in range(own)]
    devices = np.array([SimpleNamespace(slice_index=n, id=i) for n, i in pairs])
    return SimpleNamespace(axis_names=tuple(axes), devices=devices.reshape(sizes))


def module(*lines, others="", partitions=8):
    entry = "\n".join(f"  {line}" for line in lines)
    return parse(
        f"HloModule m, is_scheduled=true, num_partitions={partitions}\n\n"
        f"%sum (a: f32[], b: f32[]) -> f32[] {{\n  ROOT %s = f32[] add(%a, %b)\n}}\n{others}\n"
        f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  %p = f32[4]{{0}} parameter(0)\n{entry}\n}}\n"
    )


def found(*lines, on=None, **options):
    on = mesh(a=2, b=2, c=2) if on is None else on
    read = module(*lines, **options)
    return collectives(read, Devices(on, read.num_partitions))


# Replica groups


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", "a", 2),
        ("{{0,1},{2,3},{4,5},{6,7}}", "c", 2),
        ("{{0,1,4,5},{2,3,6,7}}", "ac", 4),
        ("{}", "abc", 8),
        ("[1,8]<=[8]", "abc", 8),
        ("[4,2]<=[8]", "c", 2),
        ("[4,2]<=[4,2]T(1,0)", "b", 2),  # {0,2}, {4,6}, {1,3}, {5,7}
        ("[4,2]<=[2,4]T(1,0)", "a", 2),
        ("[2,4]<=[2,2,2]T(1,0,2)", "ac", 4),
        ("mesh['a'=2,'b'=2,'c'=2] {'b'}", "b", 2),
        ("@named_mesh['x'=2,'y'=4] {'y'}", "bc", 4),
        ("mesh['x'=4,'y'=2] {'x','y'}", "abc", 8),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", "bc", 4),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", "a", 2),
        ("mesh['x'=2,'y'=4], device_ids=(0,4,1,5,2,6,3,7) {'x'}", "b", 2),
    ],
)
def test_three_notations_of_groups(groups, axes, size):
    line = f"ROOT %r = f32[4]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%sum"
    (only,) = found(line)
    assert only.axes == tuple(axes)
    assert only.group_size == size


def test_groups_of_one_device_send_nothing():
    assert found("ROOT %r = f32[4]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%s") == ()


def test_a_program_that_is_not_divided_over_the_mesh_is_an_error():
    with pytest.raises(ValueError, match="into 4 parts, on a mesh of 8 devices"):
        found(partitions=4)


@pytest.mark.parametrize("groups", ["all", "mesh['x'=8] {'x':(1)2}"])
def test_groups_that_cannot_be_read_are_an_error(groups):
    message = re.escape(f"cannot read the replica groups in , replica_groups={groups}")
    with pytest.raises(ValueError, match=message):
        found(f"ROOT %r = f32[4]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%sum")


# Operations and what they are passed


@pytest.mark.parametrize(
    ("line", "operation", "dtype", "size"),
    [
        ("f32[8]{0} all-gather(%p), replica_groups={{0,1}}", "all-gather", "float32", 16),
        ("f32[2]{0} reduce-scatter(%p), replica_groups={{0,1}}", "reduce-scatter", "float32", 16),
        ("f32[4]{0} all-to-all(%p), replica_groups={{0,1}}", "all-to-all", "float32", 16),
        (
            "f32[4]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            "float32",
            16,
        ),
        (
            "f32[4]{0} send(%p, %t), frontend_attributes="
            '{_xla_send_recv_source_target_pairs="{{0,1},{1,0}}"}',
            "collective-permute",
            "float32",
            16,
        ),
        (
            "f32[4]{0} collective-broadcast(%p), replica_groups={{0,1}}",
            "collective-broadcast",
            "float32",
            16,
        ),
        (
            "(f32[4]{0}, s32[]) all-reduce(%p, %i), replica_groups={{0,1}}, to_apply=%sum",
            "all-reduce",
            "float32+int32",
            20,
        ),
        ("s4[8]{0:E(4)} all-gather(%q), replica_groups={{0,1}}", "all-gather", "int4", 3),
        ("pred[8]{0} all-gather(%o), replica_groups={{0,1}}", "all-gather", "bool", 5),
    ],
)
def test_operations(line, operation, dtype, size):
    (only,) = found(
        "%i = s32[] constant(1)",
        "%q = s4[5]{0:E(4)} constant({...})",
        "%o = pred[5]{0} constant({...})",
        f"ROOT %r = {line}",
    )
    assert (only.operation, only.dtype, only.bytes) == (operation, dtype, size)
    assert (only.axes, only.count, only.loops, only.between_slices) == (("c",), 1, 0, False)


def test_what_starts_and_ends_counts_once():
    """A GPU's asynchronous collectives, and one that is wrapped in a computation."""
    wrapped = (
        "%wrapped (q: f32[4]) -> f32[2] {\n  %q = f32[4]{0} parameter(0)\n  ROOT %x = f32[2]{0}"
    )
    got = found(
        "%r = f32[4]{0} all-reduce-start(%p), replica_groups={{0,1}}, to_apply=%sum",
        "%r2 = f32[4]{0} all-reduce-done(%r)",
        "%g = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), replica_groups={{0,1}}",
        "%g2 = f32[8]{0} all-gather-done(%g)",
        "%c = (f32[4]{0}, f32[4]{0}, u32[]) collective-permute-start(%p), "
        "source_target_pairs={{0,1}}",
        "%c2 = f32[4]{0} collective-permute-done(%c)",
        "%s = ((f32[4]{0}), f32[2]{0}, s32[]) reduce-scatter-start(%p), replica_groups={{0,1}}",
        "%s2 = f32[2]{0} reduce-scatter-done(%s)",
        "%t = ((f32[4]{0}), f32[2]{0}, u32[]) async-start(%p), calls=%wrapped",
        "ROOT %t2 = f32[2]{0} async-done(%t), calls=%wrapped",
        others=f"{wrapped} reduce-scatter(%q), replica_groups={{{{0,1}}}}\n}}",
    )
    names = ["all-reduce", "all-gather", "collective-permute", "reduce-scatter", "reduce-scatter"]
    assert [c.operation for c in got] == names
    assert {c.bytes for c in got} == {16}


def test_a_collective_that_a_tpu_advances_in_several_fusions_counts_once():
    gather = "= f32[8]{0} all-gather(%x), channel_id=3, replica_groups={{0,1}}"
    start = '(%g), custom_call_target="AsyncCollectiveStart"'
    done = '(%g), custom_call_target="AsyncCollectiveDone"'
    parts = {
        "first": f"  ROOT %e = (f32[4], u32[]) custom-call{start}",
        "next": "  ROOT %e = (f32[8], u32[]) tuple(%g, %x)",
        "last": f"  ROOT %e = f32[8]{{0}} custom-call{done}",
    }
    text = "".join(
        f"%{name} (x: f32[4]) -> f32[4] {{\n  %x = f32[4]{{0}} parameter(0)\n  %g {gather}\n"
        f"{line}\n}}\n"
        for name, line in parts.items()
    )
    calls = [f"%f.{n} = f32[8]{{0}} fusion(%p), kind=kCustom, calls=%{n}" for n in parts]
    (only,) = found(*calls, others=text)
    assert (only.operation, only.bytes, only.count) == ("all-gather", 16, 1)


def test_an_all_reduce_of_which_a_tpu_keeps_a_part_is_a_reduce_scatter():
    text = (
        "%all-reduce-scatter.1 (x: f32[4]) -> f32[2] {\n  %x = f32[4]{0} parameter(0)\n"
        "  %r = f32[4]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%sum\n"
        "  ROOT %d = f32[2]{0} dynamic-slice(%r), dynamic_slice_sizes={2}\n}"
    )
    (only,) = found("ROOT %f = f32[2]{0} fusion(%p), calls=%all-reduce-scatter.1", others=text)
    assert (only.operation, only.bytes) == ("reduce-scatter", 16)


# Slices


@pytest.mark.parametrize("offset", [100_000, 4])
@pytest.mark.parametrize(
    ("target", "kind", "operation", "axes"),
    [
        ('"{1,2}x{0:3}"', "ALL_REDUCE", "all-reduce", ("a",)),
        ('"{1:2}x{0,1,2,3}"', "ALL_GATHER", "all-gather", ("a",)),
        ("{{100000,200000},{100001,200001}}", "ALL_TO_ALL", "all-to-all", ("a",)),
        ("{{100000->200001}}", "ONE_TO_ONE", "collective-permute", ("a", "b")),
    ],
)
def test_what_crosses_slices(target, kind, operation, axes, offset):
    """The program is that of one slice: the groups within it are numbered from 0."""
    attributes = (
        f"frontend_attributes={{_xla_megascale_target={target},"
        f'_xla_megascale_transfer_type="{kind}"}}'
    )
    between, within = found(
        "%t = token[] after-all()",
        f"%s = (f32[4]{{0}}, u32[], token[]) send(%p, %t), channel_id=2, {attributes}",
        f"%r = (f32[4]{{0}}, u32[], token[]) recv(%t), channel_id=1, {attributes}",
        "%d = token[] send-done(%s), channel_id=2",
        "ROOT %g = f32[4]{0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%sum",
        on=mesh(2, offset, a=2, b=4),
        partitions=4,
    )
    assert (between.operation, between.axes, between.bytes) == (operation, axes, 16)
    assert between.between_slices
    assert (within.operation, within.axes, within.between_slices) == ("all-reduce", ("b",), False)


@pytest.mark.parametrize("late", [False, True])
def test_what_is_computed_while_a_transfer_is_in_flight(late):
    """A fusion of 5 cycles and, if it is received late, four trips of a loop of 10."""
    attributes = (
        'frontend_attributes={_xla_host_transfer_rendezvous="%s",_xla_megascale_target='
        '"{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    cost = 'calls=%%none, backend_config={"estimated_cycles":"%d"}'
    others = (
        "%none (x: f32[4]) -> f32[4] {\n  ROOT %x = f32[4]{0} parameter(0)\n}\n"
        "%condition (x: f32[4]) -> pred[] {\n  ROOT %c = pred[] constant(true)\n}\n"
        "%body (x: f32[4]) -> f32[4] {\n  %x = f32[4]{0} parameter(0)\n"
        f"  ROOT %f = f32[4]{{0}} fusion(%x), {cost % 10}\n}}"
    )
    loop = [f"%w = f32[4]{{0}} while(%p), condition=%condition, body=%body{NOTED}"]
    received = ["%d = (f32[4]{0}, token[]) recv-done(%r), channel_id=1"]
    between, unknown = found(
        "%t = token[] after-all()",
        f"%s = (f32[4]{{0}}, u32[], token[]) send(%p, %t), {attributes % 'one'}",
        f"%b = f32[4]{{0}} fusion(%p), {cost % 5}",
        f"%r = (f32[4]{{0}}, u32[], token[]) recv(%t), {attributes % 'one'}",
        *(loop + received if late else received + loop),
        f"%a = f32[4]{{0}} fusion(%w), {cost % 3}",
        f"ROOT %o = (f32[4]{{0}}, u32[], token[]) send(%a, %t), {attributes % 'other'}",
        others=others,
        on=mesh(2, a=2, b=4),
        partitions=4,
    )
    assert between.cycles_in_flight == (45 if late else 5)
    assert unknown.cycles_in_flight is None


def test_a_transfer_between_slices_that_cannot_be_read_is_an_error():
    line = (
        '%s = f32[] send(%p, %t), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    with pytest.raises(ValueError, match="cannot read which slices communicate"):
        found(line)


# Loops

STATE = "(s32[], f32[4]{0}, s32[])"


def loop(condition, body="add(%i, %one)", start="constant(0)", end="%k", attributes=""):
    """A loop over a counter, an array that it sums over devices, and a number that it keeps."""
    parts = f"""
%condition (t: {STATE}) -> pred[] {{
  %t = {STATE} parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %k = s32[] get-tuple-element(%t), index=2
  {condition}
}}
%grow (x: s32[]) -> s32[] {{
  %x = s32[] parameter(0)
  %two = s32[] constant(2)
  ROOT %y = s32[] add(%x, %two)
}}
%less (x: s32[], y: s32[]) -> pred[] {{
  %x = s32[] parameter(0)
  %y = s32[] parameter(1)
  ROOT %c = pred[] compare(%x, %y), direction=LT
}}
%body (t: {STATE}) -> {STATE} {{
  %t = {STATE} parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[4]{{0}} get-tuple-element(%t), index=1
  %k = s32[] get-tuple-element(%t), index=2
  %one = s32[] constant(1)
  %next = s32[] {body}
  %sum = f32[4]{{0}} all-reduce(%x), replica_groups={{{{0,1}}}}, to_apply=%sum
  ROOT %r = {STATE} tuple(%next, %sum, {end})
}}"""
    entry = [
        f"%first = s32[] {start}",
        "%last = s32[] constant(7)",
        "%copied = s32[] copy(%last)",
        f"%state = {STATE} tuple(%first, %p, %copied)",
        f"ROOT %w = {STATE} while(%state), condition=%condition, body=%body{attributes}",
    ]
    (only,) = found(*entry, others=parts)
    assert only.loops == 1
    return None if only.unknown_loops else only.count


TEN = "%c = s32[] constant(10)\n  ROOT %l = pred[] "
# A TPU has integers of 64 bits as two of 32.
PAIR = """%c = s32[] constant(10)
  %zero = s32[] constant(0)
  %low = pred[] compare(%i, %c), direction=LT
  %same = pred[] compare(%k, %k), direction=EQ
  %both = pred[] and(%low, %same)
  %high = u32[] bitcast-convert(%k)
  %signed = s32[] bitcast-convert(%high)
  %less = pred[] compare(%signed, %zero), direction=LT
  ROOT %l = pred[] or(%less, %both)"""
# i != 2 and i < 10, which holds again for 3
AGAIN = """%c = s32[] constant(10)
  %two = s32[] constant(2)
  %low = pred[] compare(%i, %c), direction=LT
  %other = pred[] compare(%i, %two), direction=NE
  ROOT %l = pred[] and(%low, %other)"""
NOTED = ', backend_config={"known_trip_count":{"n":"4"}}'


@pytest.mark.parametrize(
    ("trips", "options"),
    [
        (10, dict(condition=f"{TEN}compare(%i, %c), direction=LT")),
        (11, dict(condition=f"{TEN}compare(%i, %c), direction=LE")),
        (10, dict(condition=f"{TEN}compare(%c, %i), direction=GT")),
        # XLA's note may be wrong, and counts only where the program does not show the number.
        (10, dict(condition=f"{TEN}compare(%i, %c), direction=LT", attributes=NOTED)),
        (4, dict(condition="ROOT %l = pred[] custom-call(%i)", attributes=NOTED)),
        (7, dict(condition="ROOT %l = pred[] compare(%i, %k), direction=LT")),
        (10, dict(condition=f"{TEN}fusion(%i, %c), kind=kLoop, calls=%less")),
        (5, dict(condition=f"{TEN}compare(%i, %c), direction=LT", body="fusion(%i), calls=%grow")),
        (3, dict(condition=f"{TEN}compare(%i, %c), direction=LT", start="constant(7)")),
        (0, dict(condition=f"{TEN}compare(%i, %c), direction=LT", start="constant(12)")),
        (
            9,
            dict(
                condition=f"{TEN}compare(%i, %c), direction=GE",
                body="subtract(%i, %one)",
                start="constant(18)",
            ),
        ),
        (1, dict(condition="ROOT %l = pred[] compare(%i, %k), direction=LT", end="%next")),
        (10, dict(condition=PAIR)),
        (None, dict(condition=f"{TEN}compare(%i, %c), direction=LT", start="convert(%p)")),
        (None, dict(condition=f"{TEN}compare(%i, %c), direction=LT", body="multiply(%i, %i)")),
        (None, dict(condition=f"{TEN}compare(%i, %c), direction=LT", body="add(%i, %k)", end="%i")),
        (0, dict(condition=f"{TEN}compare(%i, %c), direction=GT")),
        (None, dict(condition=f"{TEN}compare(%i, %c), direction=GE", start="constant(10)")),
        (10, dict(condition=f"{TEN}compare(%i, %c), direction=NE")),
        (None, dict(condition=f"{TEN}compare(%i, %c), direction=NE", start="constant(11)")),
        (2, dict(condition=AGAIN)),
        (None, dict(condition="ROOT %l = pred[] custom-call(%i)")),
    ],
)
def test_trips(trips, options):
    assert loop(**options) == trips


def nest(inner_start):
    """A loop of 3 trips around one of 5. The outer one keeps what the inner one starts from."""
    state = "(s32[], s32[], s32[])"
    head = f"  %t = {state} parameter(0)\n  %i = s32[] get-tuple-element(%t), index=0\n"

    def condition(name, bound):
        return (
            f"%{name} (t: {state}) -> pred[] {{\n{head}  %c = s32[] constant({bound})\n"
            "  ROOT %l = pred[] compare(%i, %c), direction=LT\n}\n"
        )

    def body(name, *lines, keep):
        return (
            f"%{name} (t: {state}) -> {state} {{\n{head}"
            "  %k = s32[] get-tuple-element(%t), index=1\n  %one = s32[] constant(1)\n"
            + "".join(f"  {line}\n" for line in lines)
            + f"  %n = s32[] add(%i, %one)\n  ROOT %r = {state} tuple(%n, {keep}, %i)\n}}\n"
        )

    dot = "%d = f32[2,3]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    operands = "%a = f32[2,5]{1,0} constant({...})", "%b = f32[5,3]{1,0} constant({...})"
    inner = f"%w = {state} while(%s), condition=%inner, body=%in, backend_config={{}}"
    return parse(
        "HloModule m\n\n"
        + condition("inner", 5)
        + body("in", *operands, dot + ', backend_config={"estimated_cycles":"7"}', keep="%k")
        + condition("outer", 3)
        + body("out", f"%s = {state} tuple({inner_start}, %k, %k)", inner, keep="%k")
        + f"ENTRY %main (p: f32[4]) -> {state} {{\n  %z = s32[] constant(0)\n"
        f"  %s = {state} tuple(%z, %z, %z)\n"
        '  %f = f32[4]{0} fusion(%s), calls=%none, backend_config={"estimated_cycles":"100"}\n'
        f"  ROOT %w = {state} while(%s), condition=%outer, body=%out\n}}\n"
    )


def test_costs_in_nested_loops():
    nested = nest("%k")
    assert flops(nested) == Total(3 * 5 * 2 * 2 * 3 * 5, unknown_loops=False)
    assert cycles(nested) == Total(100 + 3 * 5 * 7, unknown_loops=False)
    (dot,) = [run for run in runs(nested) if run.instruction.opcode == "dot"]
    assert (dot.times, dot.loops, dot.unknown_loops) == (15, 2, 0)
    unknown = nest("%i")  # the inner loop starts from the counter of the outer one
    assert flops(unknown) == Total(3 * 2 * 2 * 3 * 5, unknown_loops=True)
    assert cycles(unknown) == Total(100 + 3 * 7, unknown_loops=True)


def test_of_branches_the_most_expensive_one_counts():
    cost = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
    parts = "".join(
        f"%{name} (x: f32[4]) -> f32[4] {{\n  %x = f32[4]{{0}} parameter(0)\n"
        f"  ROOT %y = f32[4]{{0}} copy(%x), {cost % number}\n}}\n"
        for name, number in (("yes", 30), ("no", 50))
    )
    one = "%c = f32[4]{0} conditional(%b, %p, %p), branch_computations={%yes, %no}"
    two = "%d = f32[4]{0} conditional(%b, %p, %p), true_computation=%yes, false_computation=%yes"
    called = "%e = f32[4]{0} call(%p), to_apply=%no"
    assert cycles(module(one, two, called, others=parts)) == Total(50 + 30 + 50, False)
    assert cycles(module(one)) is None


def test_a_branch_that_xla_writes_as_a_loop_is_not_a_loop_of_unknown_length():
    """The body sets the condition to false."""
    state = "(pred[], f32[4]{0})"
    head = f"  %t = {state} parameter(0)\n  %go = pred[] get-tuple-element(%t), index=0\n"
    parts = f"""%condition (t: {state}) -> pred[] {{
{head}  ROOT %copied = pred[] copy(%go)
}}
%body (t: {state}) -> {state} {{
{head}  %x = f32[4]{{0}} get-tuple-element(%t), index=1
  %no = pred[] constant(END)
  %sum = f32[4]{{0}} all-reduce(%x), replica_groups={{{{0,1}}}}, b={{"estimated_cycles":"7"}}
  ROOT %r = {state} tuple(%no, %sum)
}}"""
    lines = (
        "%yes = pred[] custom-call()",
        f"%state = {state} tuple(%yes, %p)",
        f"ROOT %w = {state} while(%state), condition=%condition, body=%body",
    )
    for end, unknown in (("false", False), ("true", True)):
        others = parts.replace("END", end)
        assert cycles(module(*lines, others=others)) == Total(7, unknown)
        (only,) = found(*lines, others=others)
        assert (only.count, only.unknown_loops, only.conditional) == (1, unknown, not unknown)


# What GPUs call libraries for


@pytest.mark.parametrize(
    ("line", "count"),
    [
        (
            '(f32[6,7], s8[9]) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
            6 * 7 * 8,
        ),
        (
            'f32[6,7] custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config='
            r'"{\"dot_dimension_numbers\":{\"lhs_contracting_dimensions\":[\"1\"]}}"',
            6 * 7 * 8,
        ),
        (
            "(f32[2,4,4,5], u8[0]) custom-call(%x, %k), window={size=3x3}, "
            'dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward"',
            2 * 4 * 4 * 5 * 9 * 3,
        ),
        (
            "(f32[2,6,6,3], u8[0]) custom-call(%y, %k), window={size=3x3}, "
            'dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardInput"',
            2 * 4 * 4 * 5 * 9 * 3,
        ),
        (
            "(f32[3,3,3,5], u8[0]) custom-call(%x, %y), window={size=3x3}, "
            'dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardFilter"',
            2 * 4 * 4 * 5 * 9 * 3,
        ),
        ('f32[6] custom-call(%a), custom_call_target="TopK"', 0),
    ],
)
def test_flops_of_library_calls(line, count):
    operands = [
        f"%{name} = f32[{shape}] constant({{...}})"
        for name, shape in (
            ("a", "6,8"), ("b", "8,7"), ("x", "2,6,6,3"), ("k", "3,3,3,5"), ("y", "2,4,4,5")
        )
    ]  # fmt: skip
    assert flops(module(*operands, f"ROOT %r = {line}")) == Total(2 * count, False)


# Types


@pytest.mark.parametrize(
    ("text", "dtype", "size"),
    [
        ("f32[2,3]{1,0:T(8,128)}", "float32", 24),
        ("bf16[]", "bfloat16", 2),
        ("pred[9]", "bool", 9),
        ("u4[3]{0:T(8,128)E(4)}", "uint4", 2),
        ("s4[3]{0}", "int4", 3),  # in memory each takes up a byte, unless the layout packs them
        ("s4[3]", "int4", 2),
        ("f8e4m3fn[5]{0}", "float8_e4m3fn", 5),
        ("c64[2]", "complex64", 16),
        ("s32[<=5]", "int32", 20),
    ],
)
def test_types(text, dtype, size):
    (only,) = arrays(text)
    assert (only.dtype, only.nbytes) == (dtype, size)
    assert [x.nbytes for x in arrays(f"(({text}), token[], /*index=2*/{text})")] == [size] * 2


def test_an_instruction_that_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="cannot read this instruction: %r = f32"):
        module("%r = f32[4]{0} +")
