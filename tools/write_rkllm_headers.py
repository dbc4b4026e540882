"""Write the stand-in library's headers from the recorded ABI of the RKLLM runtime.

    python tools/write_rkllm_headers.py ABI.json [FOLDER]

ABI.json is the reference's rkllm_abi.json (sizes and offsets computed with gcc from the public headers).  Each header
declares one family's types and functions and asserts every size and offset at compile time, so that a compiler that
lays a struct out differently refuses to build the stand-in.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "rkllm_standin" / "include"


def header_name(family: str) -> str:
    return f"rkllm_{re.sub('[^0-9a-z]', '_', family)}.h"


def header(family: str, abi: dict[str, Any]) -> str:
    """The C header of one family."""
    parts = [
        f"// RKLLM runtime ABI of family {family} ({', '.join(abi['versions'])}).",
        "// Written by tools/write_rkllm_headers.py from the recorded ABI; do not edit.",
        "#pragma once",
        "#include <stdbool.h>",
        "#include <stddef.h>",
        "#include <stdint.h>",
        "",
        "#define SIZE(type, size, align) _Static_assert(sizeof(type) == size && _Alignof(type) == align, #type)",
        "#define AT(type, field, offset, size) \\",
        '    _Static_assert(offsetof(type, field) == offset && sizeof(((type*)0)->field) == size, #type "." #field)',
        "",
        "typedef void* LLMHandle;",
    ]
    for name, values in abi["enums"].items():
        members = ", ".join(f"{key} = {value}" for key, value in values.items() if key != "__size__")
        parts += ["", f"typedef enum {{ {members} }} {name};", f"SIZE({name}, {values['__size__']}, 4);"]
    structs = dict(abi["structs"])
    callback_struct = structs.pop("RKLLMCallback", None)
    for name, struct in structs.items():
        parts += ["", *_struct(name, struct)]
    for name, declaration in abi["callbacks"].items():
        parts += ["", f"typedef {declaration};"] if name in declaration else []
    if callback_struct:
        parts += ["", *_struct("RKLLMCallback", callback_struct)]
    parts += ["", '#define RKLLM_API __attribute__((visibility("default")))', ""]
    parts += [f"RKLLM_API {declaration};".replace("()", "(void)") for declaration in abi["functions"].values()]
    return "\n".join(parts) + "\n"


def _struct(name: str, struct: dict[str, Any]) -> list[str]:
    fields: dict[str, list[int]] = struct["fields"]
    lines = ["typedef struct {", *_members("", struct, "    "), f"}} {name};"]
    lines.append(f"SIZE({name}, {struct['size']}, {struct['align']});")
    return lines + [f"AT({name}, {path}, {offset}, {size});" for path, (offset, size) in fields.items()]


def _members(prefix: str, struct: dict[str, Any], indent: str) -> list[str]:
    """Declarations of the members directly under prefix; members with one offset are an anonymous union."""
    own = [path for path in struct["fields"] if path.startswith(prefix) and "." not in path[len(prefix) :]]
    offsets = [struct["fields"][path][0] for path in own]
    shared = [path for path, offset in zip(own, offsets, strict=True) if offsets.count(offset) > 1]
    lines = []
    for path in own:
        if shared and path == shared[0]:
            lines.append(f"{indent}union {{")
        inner = indent + "    " if path in shared else indent
        lines += _member(path, path[len(prefix) :], struct, inner)
        if shared and path == shared[-1]:
            lines.append(f"{indent}}};")
    return lines


def _member(path: str, name: str, struct: dict[str, Any], indent: str) -> list[str]:
    kind = struct["ctypes_decl"][path]
    if kind == "struct (nested)":
        return [f"{indent}struct {{", *_members(f"{path}.", struct, indent + "    "), f"{indent}}} {name};"]
    array = re.fullmatch(r"(\w+)(\[\d+\])", kind)
    return [f"{indent}{array[1]} {name}{array[2]};" if array else f"{indent}{kind} {name};"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("abi", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for family, abi in json.loads(options.abi.read_text())["families"].items():
        (options.folder / header_name(family)).write_text(header(family, abi))


if __name__ == "__main__":
    main()
