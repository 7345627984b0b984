"""The report of the native kernels' loops, on a disassembly written by hand."""

import shutil

import pytest

from bench import native_build
from ppap.kernels import native

PRODUCT = "vfmadd231ps %zmm1,%zmm2,%zmm3"
NAME = "_ZN4ppap6avx512L13register_tileILi12ENS0_8RowMajorIfEEfEEvT0_PKT1_lPf"


def function(name: str, instructions: list[str], back_to: int) -> str:
    """What objdump prints of a loop from instruction `back_to` to the end."""
    lines = [f"    {0x100 + i:x}:\t{text}" for i, text in enumerate(instructions)]
    lines.append(f"    {0x100 + len(lines):x}:\tjne    {0x100 + back_to:x} <{name}+0x{back_to:x}>")
    return f"0000000000000100 <{name}>:\n" + "\n".join(lines) + "\n\n"


def test_a_loop_in_registers_and_one_on_the_stack():
    spill = "vmovaps %zmm3,0x40(%rsp)"
    text = function(NAME, ["xor %eax,%eax", *[PRODUCT] * 12], 1)
    text += function(NAME.replace("6avx512L", "4avx2L"), [*[PRODUCT] * 12, spill], 0)
    clean, spilled = native_build.loops(text)
    assert clean == ("avx512", "rows as they lie", "fmadd", ())
    assert spilled == ("avx2", "rows as they lie", "fmadd", (spill,))
    assert "| avx512 | rows as they lie | fmadd | 1 | 0 |" in native_build.table([clean, spilled])
    assert "| avx2 | rows as they lie | fmadd | 1 | 1 |" in native_build.table([clean, spilled])


def test_what_is_no_loop_of_products_is_left_out():
    few = function(NAME, [PRODUCT] * 11, 0)
    thin = function(NAME, [*[PRODUCT] * 12, *["add %rax,%rbx"] * 60], 0)
    outside = function(NAME, [*[PRODUCT] * 12, "vmovaps %zmm3,0x40(%rsp)", "inc %rax"], 13)
    other = function("main", [PRODUCT] * 12, 0)
    assert native_build.loops(few + thin + outside + other) == []


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
def test_the_library_has_its_products_in_registers():
    found = native_build.loops(native_build.disassembly(native.FILE))
    sets = {isa for isa in native.available_isas() if isa != "portable"}
    assert sets <= {loop.isa for loop in found}
    for isa in sets:
        assert {loop.left for loop in found if loop.isa == isa} == {"rows as they lie", "packed columns"}
    assert not [loop for loop in found if loop.stack]
