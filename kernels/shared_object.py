"""An object file of compiled kernels to a shared object, which the operating system loads by itself.

A linker for what LLVM writes here and no more, so that bundling needs none: ELF for x86-64, one exported function, code
and constants that refer to one another by distances, and a few functions of the C library. Layouts are those of the
System V ABI ("Object Files", "Dynamic Linking"), formulas those of its AMD64 supplement (4.4, "Relocation").
"""

from __future__ import annotations

import struct
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PAGE = 4096
HEADER, SEGMENT = struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ")
SECTION = np.dtype(
    {
        "names": ["name", "type", "flags", "address", "offset", "size", "link", "info", "align", "entry"],
        "formats": ["<u4", "<u4", "<u8", "<u8", "<u8", "<u8", "<u4", "<u4", "<u8", "<u8"],
    }
)
SYMBOL = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"), ("size", "<u8")]
)
RELOCATION = np.dtype([("place", "<u8"), ("kind", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])
IDENTITY = b"\x7fELF\2\1\1".ljust(16, b"\0")  # 64 bits, little-endian
RELOCATABLE, SHARED, X86_64 = 1, 3, 62
PROGBITS, SYMBOLS, RELOCATIONS, ALLOCATED = 1, 2, 4, 2
PC64, GOTOFF64, GOT64, GOTPC64, GLOB_DAT = 24, 25, 27, 29, 6
LOADED, DYNAMIC, STACK = 1, 2, 0x6474E551
READ_EXECUTE, READ_WRITE = 5, 6
GLOBAL_FUNCTION = 0x12  # a symbol's info
ADDRESSES = "_GLOBAL_OFFSET_TABLE_"
HEADS = HEADER.size + 4 * SEGMENT.size


class _Object(NamedTuple):
    """A parsed object file: its content, sections, symbols and their names."""

    code: bytes
    sections: Any
    symbols: Any
    names: list[str]

    def content(self, section: Any) -> bytes:
        return self.code[section["offset"] : section["offset"] + section["size"]]


def link(code: bytes, entry: str) -> bytes:
    """The shared object with the function `entry`. ValueError for an object file unlike those that LLVM makes here."""
    found = _parsed(code)
    imports = [name for name, s in zip(found.names, found.symbols, strict=True) if name and not s["section"]]
    imports = [name for name in imports if name != ADDRESSES]
    names = ["", *imports, entry]
    sizes = (SYMBOL.itemsize * len(names), RELOCATION.itemsize * len(imports), 4 * (3 + len(names)))
    symbols_at, relocations_at, hash_at, strings_at = accumulate(sizes, initial=HEADS)
    strings = b"".join(name.encode() + b"\0" for name in names)
    at, end = _places(found, strings_at + len(strings))
    got = _up(end, PAGE)  # the table of addresses, which the loader fills; behind it `dynamic`
    tags = {4: hash_at, 5: strings_at, 6: symbols_at, 10: len(strings), 11: SYMBOL.itemsize}
    tags |= {7: relocations_at, 8: RELOCATION.itemsize * len(imports), 9: RELOCATION.itemsize, 0: 0}
    dynamic = np.array(list(tags.items()), np.uint64).tobytes()
    main = found.symbols[found.names.index(entry)]
    tables = _tables(names, got, at[main["section"]] + main["value"], main["size"]) + strings
    image = bytearray(got)
    image[:HEADS] = _heads(end, got, 8 * len(imports), len(dynamic))
    image[HEADS : HEADS + len(tables)] = tables
    for number in np.flatnonzero(at):
        content = found.content(found.sections[number])
        image[at[number] : at[number] + len(content)] = content
    _relocate(image, found, at, got, imports)
    return bytes(image) + bytes(8 * len(imports)) + dynamic


def _tables(names: list[str], got: int, start: int, size: int) -> bytes:
    """What the loader reads: symbols ("", imports, entry), which address goes where, and the symbols' hash table."""
    symbols = np.zeros(len(names), SYMBOL)
    symbols["name"] = [0, *accumulate(len(name) + 1 for name in names[:-1])]
    symbols["info"][1:] = GLOBAL_FUNCTION
    symbols["section"][-1] = 1  # any but none
    symbols["value"][-1], symbols["size"][-1] = start, size
    wanted = [(got + 8 * number, GLOB_DAT, number + 1, 0) for number in range(len(names) - 2)]
    chain = [0, *range(len(names) - 1)]  # one bucket: every name is looked at, the last one first
    hashes = np.array([1, len(names), len(names) - 1, *chain], np.uint32)
    return symbols.tobytes() + np.array(wanted, RELOCATION).tobytes() + hashes.tobytes()


def _parsed(code: bytes) -> _Object:
    if len(code) < HEADER.size or code[:16] != IDENTITY:
        raise ValueError("not an object file of this kind: bundling is for ELF on x86-64")
    fields = HEADER.unpack_from(code)
    if fields[1:3] != (RELOCATABLE, X86_64):
        raise ValueError(f"bundling is for object files of x86-64, found kind and machine {fields[1:3]}")
    sections = np.frombuffer(code, SECTION, fields[12], fields[6])
    (table,) = sections[sections["type"] == SYMBOLS]
    found = _Object(code, sections, None, [])
    strings = found.content(sections[table["link"]])
    symbols = np.frombuffer(found.content(table), SYMBOL)
    names = [strings[start : strings.index(b"\0", start)].decode() for start in symbols["name"].tolist()]
    return _Object(code, sections, symbols, names)


def _places(found: _Object, end: int) -> tuple[NDArray[np.int64], int]:
    """Where each section of code and constants comes to lie, 0 for the others, and where the last one ends.

    What exceptions and debuggers would read is left out: the kernels raise nothing.
    """
    at = np.zeros(len(found.sections), np.int64)
    for number, section in enumerate(found.sections):
        if section["type"] == PROGBITS and section["flags"] & ALLOCATED and section["size"]:
            at[number] = _up(end, int(section["align"]))
            end = int(at[number] + section["size"])
    return at, end


def _relocate(image: bytearray, found: _Object, at: NDArray[np.int64], got: int, imports: list[str]) -> None:
    """Write every distance between code, constants and the table of addresses, 8 bytes each."""
    for table in found.sections[found.sections["type"] == RELOCATIONS]:
        base = int(at[table["info"]])
        for place, kind, symbol, addend in np.frombuffer(found.content(table), RELOCATION).tolist() if base else ():
            target = found.symbols[symbol]
            value = int(at[target["section"]] + target["value"]) + addend
            if kind == PC64:
                value -= base + place
            elif kind == GOTOFF64:
                value -= got
            elif kind == GOTPC64:
                value = got + addend - base - place
            elif kind == GOT64:
                value = 8 * imports.index(found.names[symbol]) + addend
            if kind not in (PC64, GOTOFF64, GOTPC64, GOT64) or (kind in (PC64, GOTOFF64) and not target["section"]):
                raise ValueError(f"relocation {kind} of {found.names[symbol]!r} is of a kind that kernels do not need")
            struct.pack_into("<q", image, base + place, value)


def _heads(end: int, got: int, got_bytes: int, dynamic_bytes: int) -> bytes:
    """The ELF header and the segments: code and constants, then what the loader writes; no executable stack."""
    size = got_bytes + dynamic_bytes
    segments = (
        (LOADED, READ_EXECUTE, 0, 0, 0, end, end, PAGE),
        (LOADED, READ_WRITE, got, got, got, size, size, PAGE),
        (DYNAMIC, READ_WRITE, *3 * (got + got_bytes,), dynamic_bytes, dynamic_bytes, 8),
        (STACK, READ_WRITE, 0, 0, 0, 0, 0, 16),
    )
    sizes = (HEADER.size, SEGMENT.size, len(segments), 0, 0, 0)
    head = HEADER.pack(IDENTITY, SHARED, X86_64, 1, 0, HEADER.size, 0, 0, *sizes)
    return head + b"".join(SEGMENT.pack(*segment) for segment in segments)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
