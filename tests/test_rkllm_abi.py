"""The ABI tables against the recorded layouts, and against what a C compiler makes of the headers."""

from __future__ import annotations

import ctypes
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmchat.errors import EngineError
from mmchat.rkllm_abi import FAMILIES, FAMILY_OF_VERSION, Family
from mmchat.rkllm_detect import exported_symbols
from tests.rkllm_standin.build import INCLUDE, compiler, demo_model, library
from tests.rkllm_standin.driver import Driver
from tools.write_rkllm_headers import header, header_name

Struct = type[ctypes.Structure]


def recorded(reference: Path) -> dict[str, Any]:
    abi: dict[str, Any] = json.loads((reference / "rkllm_abi.json").read_text())
    return abi


def field_type(struct: Any, name: str) -> Any:
    """The declared type of a field, also of one in an anonymous union."""
    for field, kind, *_ in struct._fields_:
        if field == name:
            return kind
        if field in getattr(struct, "_anonymous_", ()) and hasattr(kind, name):
            return field_type(kind, name)
    raise AttributeError(name)


def place(struct: Any, path: str) -> list[int]:
    """[offset, size] of a field, nested ones with dots."""
    offset = size = 0
    for name in path.split("."):
        field = getattr(struct, name)
        offset, size = offset + field.offset, field.size
        struct = field_type(struct, name)
    return [offset, size]


def test_every_size_and_offset_is_as_recorded(reference: Path) -> None:
    n_checked = 0
    families = recorded(reference)["families"]
    assert list(families) == list(FAMILIES)
    for name, recorded_family in families.items():
        family = FAMILIES[name]
        assert set(family.structs) == set(recorded_family["structs"])
        for struct_name, expected in recorded_family["structs"].items():
            struct = getattr(family, struct_name)
            assert ctypes.sizeof(struct) == expected["size"], (name, struct_name)
            assert ctypes.alignment(struct) == expected["align"], (name, struct_name)
            for path, where in expected["fields"].items():
                assert place(struct, path) == where, (name, struct_name, path)
                n_checked += 1
    assert n_checked == 460


def test_functions_and_features_are_as_recorded(reference: Path) -> None:
    abi = recorded(reference)
    for name, family in FAMILIES.items():
        assert family.symbols == set(abi["detection"]["symbols_by_family"][name])
        assert family.symbols == set(abi["families"][name]["functions"])
        assert (family.clear_kv_args or None) == abi["clear_kv_cache_arity"][name]
        assert family.callback_struct == (abi["rkllm_init_third_arg"][name] == "RKLLMCallback*")
        assert family.callback_returns_int == (abi["families"][name]["callback_returns"] == "int")
        assert list(family.versions) == abi["families"][name]["versions"]
        structs = abi["families"][name]["structs"]
        assert family.keep_history == ("keep_history" in structs["RKLLMInferParam"]["fields"])
        assert family.run_sampling == ("sampling_params" in structs["RKLLMInferParam"]["fields"])
        assert family.has_role == ("role" in structs["RKLLMInput"]["fields"])
        assert family.perf == ("perf" in structs["RKLLMResult"]["fields"])
        assert family.ignore_eos == ("ignore_eos_token" in structs["RKLLMParam"]["fields"])
        assert family.n_batch == ("n_batch" in structs["RKLLMExtendParam"]["fields"])
        for function in family.functions:
            declaration: str = abi["families"][name]["functions"][function.name]
            n_arguments = 0 if declaration.endswith("()") else declaration.count(",") + 1
            assert len(function.argtypes) == n_arguments, declaration


def test_the_headers_are_what_the_tool_writes(reference: Path) -> None:
    for name, abi in recorded(reference)["families"].items():
        assert (INCLUDE / header_name(name)).read_text() == header(name, abi)


def test_every_version_has_one_family() -> None:
    assert len(FAMILY_OF_VERSION) == sum(len(family.versions) for family in FAMILIES.values())
    assert FAMILY_OF_VERSION["1.2.2"] == "1.2.1-1.2.3"


def test_an_absent_struct_is_named() -> None:
    with pytest.raises(AttributeError, match=r"RKLLM ABI 1\.1 has no RKLLMSamplingParam"):
        _ = FAMILIES["1.1"].RKLLMSamplingParam
    assert not hasattr(FAMILIES["1.3.0"], "sampling_params")


# ------------------------------------------------------------------------------------- a C compiler's view of the same


def leaves(struct: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that is no struct, with its type; of a union all members."""
    for name, kind, *_ in struct._fields_:
        if name in getattr(struct, "_anonymous_", ()):
            yield from leaves(kind, prefix)
        elif isinstance(kind, type) and issubclass(kind, (ctypes.Structure, ctypes.Union)):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def groups(struct: Struct) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """The struct's fields in sets that do not overlap: one set, or one per member of its union."""
    union: Any = next((kind for name, kind, *_ in struct._fields_ if name in getattr(struct, "_anonymous_", ())), None)
    if union is None:
        yield struct.__name__, list(leaves(struct))
        return
    members = [name for name, *_ in union._fields_]
    for member in members:
        others = tuple(name for name in members if name != member)
        fields = [(path, kind) for path, kind in leaves(struct) if path.split(".")[0] not in others]
        yield f"{struct.__name__}_{member}", fields


def expected_value(number: int, kind: Any) -> Any:
    if kind is ctypes.c_char_p:
        return b"text-%d" % number
    if kind is ctypes.c_bool:
        return True
    if kind is ctypes.c_float:
        return number + 0.5
    if kind in (ctypes.c_int8, ctypes.c_uint8) or hasattr(kind, "_length_"):
        return number * 7 % 100 + 1
    return 0x1000 + 16 * number  # also for pointers: an address that nobody follows


def c_checks(path: str, kind: Any, value: Any) -> tuple[str, str]:
    """C that sets the field, and C that is true where it is set."""
    field = f"s->{path}"
    if kind is ctypes.c_char_p:
        return f'{field} = (char*)"{value.decode()}";', f'{field} && !strcmp({field}, "{value.decode()}")'
    if hasattr(kind, "_length_"):
        return f"memset({field}, {value}, {kind._length_});", f"all({field}, {value}, {kind._length_})"
    if kind is ctypes.c_bool:
        return f"{field} = true;", field
    if issubclass(kind, ctypes._SimpleCData) and kind is not ctypes.c_void_p:
        return f"{field} = {value};", f"{field} == {value}"
    return f"{field} = (void*){value};", f"(void*){field} == (void*){value}"


def python_set(target: Any, path: str, kind: Any, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        target = getattr(target, parent)
    if hasattr(kind, "_length_"):
        value = kind(*[value] * kind._length_)
    elif not issubclass(kind, ctypes._SimpleCData):
        value = ctypes.cast(value, kind)
    setattr(target, name, value)


def python_get(target: Any, path: str, kind: Any) -> Any:
    for name in path.split("."):
        target = getattr(target, name)
    if hasattr(kind, "_length_"):
        assert len(set(target)) == 1
        return target[0]
    if not issubclass(kind, ctypes._SimpleCData):
        return ctypes.cast(target, ctypes.c_void_p).value
    return target


def mirror(family: Family, folder: Path) -> ctypes.CDLL:
    """A C library with fill_X and check_X for every struct of the family's header."""
    library(family.name)  # skips where there is no compiler
    parts = [
        f'#include "{header_name(family.name)}"\n#include <string.h>',
        "static int all(const uint8_t* bytes, int value, int n)"
        " { while (n--) if (bytes[n] != value) return 0; return 1; }",
    ]
    for struct_name, struct in family.structs.items():
        for name, fields in groups(struct):
            pairs = [c_checks(path, kind, expected_value(i, kind)) for i, (path, kind) in enumerate(fields)]
            fill = "\n".join(setting for setting, _ in pairs)
            check = "\n".join(f"if (!({good})) return {i + 1};" for i, (_, good) in enumerate(pairs))
            parts.append(f"void fill_{name}({struct_name}* s) {{\n{fill}\n}}")
            parts.append(f"int check_{name}({struct_name}* s) {{\n{check}\nreturn 0;\n}}")
    parts.append(
        "RKLLMParam make_RKLLMParam(void) { RKLLMParam s; memset(&s, 0, sizeof s); fill_RKLLMParam(&s); return s; }"
    )
    source, made = folder / "mirror.c", folder / "mirror.so"
    source.write_text("\n".join(parts))
    subprocess.run(
        [compiler() or "cc", "-shared", "-fPIC", "-w", f"-I{INCLUDE}", str(source), "-o", str(made)], check=True
    )
    return ctypes.CDLL(str(made))


@pytest.mark.parametrize("name", FAMILIES)
def test_fields_arrive_where_c_expects_them_and_back(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    c = mirror(family, tmp_path)
    n_fields = 0
    for struct in family.structs.values():
        for group, fields in groups(struct):
            from_c, from_python = struct(), struct()
            c[f"fill_{group}"](ctypes.byref(from_c))
            for i, (path, kind) in enumerate(fields):
                assert python_get(from_c, path, kind) == expected_value(i, kind), (group, path)
                python_set(from_python, path, kind, expected_value(i, kind))
                n_fields += 1
            wrong = c[f"check_{group}"](ctypes.byref(from_python))
            assert wrong == 0, (group, fields[wrong - 1])
    c.make_RKLLMParam.restype = family.RKLLMParam
    assert c.check_RKLLMParam(ctypes.byref(c.make_RKLLMParam())) == 0
    assert n_fields >= 57


# --------------------------------------------------------------------------------------------------- the stand-in's ABI


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stand_in_exports_the_familys_functions(name: str) -> None:
    path = library(name)
    assert exported_symbols(path.read_bytes(), path) == FAMILIES[name].symbols


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_reach_the_stand_in(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_TRACE", str(tmp_path / "trace"))
    family = FAMILIES[name]
    given: dict[str, Any] = {
        "max_context_len": 512, "max_new_tokens": 17, "top_k": 3, "top_p": 0.25, "temperature": 0.5,
        "repeat_penalty": 1.5, "frequency_penalty": 0.125, "presence_penalty": 0.75, "mirostat": 2,
        "mirostat_tau": 3.5, "mirostat_eta": 0.0625, "skip_special_token": True, "is_async": False,
        "base_domain_id": 1,
    }  # fmt: skip
    if family.keep_history:
        given.update(n_keep=9, embed_flash=1, enabled_cpus_num=5, enabled_cpus_mask=0xF8)
    if family.n_batch:
        given.update(n_batch=2, use_cross_attn=1)
    if family.ignore_eos:
        given.update(ignore_eos_token=True)
    with Driver(library(name), name, demo_model(), **given) as driver:
        assert driver.code == 0
    seen = json.loads((tmp_path / "trace").read_text().splitlines()[0])
    assert seen == {"call": "init", "result": "ok", **given}


@pytest.mark.parametrize("name", FAMILIES)
def test_default_parameters_survive_a_wrong_family(name: str) -> None:
    """A 1.3.0 class is 24 bytes smaller than what a 1.2 library writes."""
    for thought in FAMILIES.values():
        param = thought.default_param(ctypes.CDLL(str(library(name))))
        assert param.top_k == 40
    param = FAMILIES[name].default_param(ctypes.CDLL(str(library(name))))
    found = [param.top_p, param.temperature, param.repeat_penalty, param.mirostat_tau, param.mirostat_eta]
    assert found == pytest.approx([0.9, 0.8, 1.1, 5.0, 0.1])
    assert not FAMILIES[name].keep_history or param.extend_param.enabled_cpus_num == 4
    assert not FAMILIES[name].n_batch or param.extend_param.n_batch == 1


def test_binding_names_what_is_missing() -> None:
    with pytest.raises(EngineError, match=r"has no rkllm_clear_kv_cache, rkllm_set_chat_template, which RKLLM 1\.2\.0"):
        FAMILIES["1.2.0"].bind(ctypes.CDLL(str(library("1.1"))))
