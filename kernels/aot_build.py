"""The ahead-of-time build: `python -m graphopt.kernels.aot_build OUTPUT MACHINE PLACE...`, started by `graphopt.kernels.aot`.

It has a process of its own because Numba fixes its CPU when it is imported, and because Numba is made to generate no machine code
here: it gives unoptimised LLVM IR, one module per instruction set, which is optimised and compiled for that instruction set alone.
Progress goes to stdout, one JSON object a line.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from graphopt.kernels.isa import LADDERS
from graphopt.kernels.specialise import OPTIONS

TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}
_MATHEMATICS = frozenset({"expf", "exp", "lrintf", "fmaf", "tanhf", "erff", "roundevenf", "rintf", "floorf"})
IMPORTS = _MATHEMATICS | frozenset(
    {"malloc", "calloc", "free", "memcpy", "memmove", "memset", "getenv", "sched_yield", "getauxval"}
)
"""What a library may import: C and its mathematics. Anything else, Numba's and Python's error paths above all, fails the build."""


class BuildError(Exception):
    """Code that cannot be made into a library; says why and where."""


def _generate_no_code() -> None:
    """Have Numba stop at LLVM IR: the machine code of another CPU is of no use here, and could not even be generated."""
    from numba.core import dispatcher
    from numba.core.registry import cpu_target

    context = cpu_target.target_context
    codegen = context.codegen()
    codegen._add_module = lambda _module: None

    # Numba tells compiled functions apart by this object, which must be a built-in: a method of a fresh list is one of its own
    type(context).get_executable = lambda _self, _library, _description, _environment: [].append
    dispatcher.Dispatcher.enable_caching = lambda self: None  # type: ignore[method-assign]


def _wrapper(name: str, numba_name: str, arguments: int, void: bool) -> str:
    """IR of a C function around a Numba function.

    An exception, which C code cannot receive, calls a symbol that no library may import: where the optimiser cannot show that the
    function raises nothing, the build fails and names it.
    """
    parameters = ", ".join(f"i64 %a{i}" for i in range(arguments))
    passed = "".join(f", i64 %a{i}" for i in range(arguments))
    result = "void" if void else "i64"
    back = "ret void" if void else "%v = load i64, ptr %r\n  ret i64 %v"
    return f"""
declare i32 @"{numba_name}"(ptr, ptr{", i64" * arguments})
declare void @"graphopt_exception_in_{name}"(ptr)
define {result} @"{name}"({parameters}) {{
  %r = alloca i64
  %e = alloca ptr
  store i64 0, ptr %r
  %status = call i32 @"{numba_name}"(ptr %r, ptr %e{passed})
  %ok = icmp eq i32 %status, 0
  br i1 %ok, label %done, label %raised
raised:
  %x = load ptr, ptr %e
  call void @"graphopt_exception_in_{name}"(ptr %x)
  unreachable
done:
  {back}
}}
"""


def _ir(exports: Iterable[Any]) -> list[str]:
    """The modules of exports: Numba's, one for every function that is called, each once, and the C functions."""
    from numba import njit, types

    libraries: dict[int, Any] = {}  # by identity: a library is what Numba made of one function for one signature
    wrappers = []
    for export in exports:
        dispatcher = njit(**OPTIONS)(export.function)
        dispatcher.compile((types.void if export.void else types.int64)(*[types.int64] * export.arguments))
        (made,) = dispatcher.overloads.values()
        wrappers.append(_wrapper(export.name, made.fndesc.llvm_func_name, export.arguments, export.void))
        waiting = [made.library]
        while waiting:
            library = waiting.pop()
            if id(library) not in libraries:
                libraries[id(library)] = library
                waiting.extend(library._linking_libraries)
    return [*(library.get_llvm_str() for library in libraries.values()), *wrappers]


def _machine(arch: str, isa: str) -> Any:
    """LLVM's compiler for a rung."""
    import llvmlite.binding as llvm

    from graphopt.kernels.cpu import LLVM_CPUS

    cpu, features = LLVM_CPUS[arch][isa]
    target = llvm.Target.from_triple(TRIPLES[arch])
    return target.create_target_machine(cpu=cpu, features=features, opt=3, reloc="pic", codemodel="small")


def compile_module(texts: Iterable[str], arch: str, isa: str, exported: Collection[str], known: Collection[str]) -> bytes:
    """One object of IR modules, optimised as a whole for a rung; only `exported` names are visible outside.

    `known` are the names that other objects of the library define.
    """
    import llvmlite.binding as llvm

    machine = _machine(arch, isa)
    head = f'target datalayout = "{machine.target_data}"\ntarget triple = "{TRIPLES[arch]}"\n'
    module = llvm.parse_assembly(head)
    for text in texts:
        body = re.sub(r"^target (?:datalayout|triple) = .*$", "", text, flags=re.M)
        module.link_in(llvm.parse_assembly(head + body))
    module.verify()
    for thing in [*module.functions, *module.global_variables]:
        if not thing.is_declaration and str(thing.linkage) != "Linkage.private":
            thing.linkage = "external" if thing.name in exported else "internal"
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    declared = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    bad = declared - set(known) - IMPORTS
    if bad:
        raise BuildError(
            f"code for {isa} calls what a library without Python cannot have: {', '.join(sorted(bad))}; "
            f"exceptions that the optimiser cannot rule out: {', '.join(_exceptions(str(module))) or 'none'}"
        )
    made: bytes = machine.emit_object(module)
    return made


def _exceptions(ir: str) -> list[str]:
    """The exceptions that a module still holds as pickled constants, such as ValueError: range() arg 3 must not be zero."""
    found = set()
    for text in re.findall(r'^@\.const\.pickledata\S* = .* c"(.*?)"', ir, flags=re.M):
        data = re.sub(rb"\\([0-9A-F]{2})", lambda code: bytes([int(code.group(1), 16)]), text.encode())
        try:
            kind, arguments, *_ = pickle.loads(data)  # written by Numba, in this process
        except (pickle.UnpicklingError, ValueError, EOFError, TypeError):
            continue  # its checksum
        found.add(f"{kind.__name__}: {', '.join(map(str, arguments or ()))}")
    return sorted(found)


def build(output: Path, arch: str, places: Sequence[str]) -> None:
    """Build the library of these families for an architecture."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    _generate_no_code()
    from graphopt.kernels import customop, elf, linker
    from graphopt.kernels.runtime import families

    chosen = families(places)
    rungs = [r for r in LADDERS[arch] if any(r in f.rungs for f in chosen)]
    steps = len(rungs) + 2
    storage = "graphopt_storage"
    register = customop.registration(chosen, rungs, "RegisterCustomOps", storage)
    common = {e.name: e for e in [*customop.metadata(), register]}
    exports: dict[str, list[Any]] = {}
    for isa in rungs:
        found = [e for f in chosen if isa in f.rungs for e in f.exports(isa)]
        exports[isa] = [e for e in found if e.name.endswith(f"__{isa}")]
        common |= {e.name: e for e in found if not e.name.endswith(f"__{isa}")}
    known = {storage, *common, *(e.name for found in exports.values() for e in found)}
    objects = []
    for step, isa in enumerate(rungs):
        _progress(step, steps, f"compiling for {isa}")
        objects.append(elf.read_object(compile_module(_ir(exports[isa]), arch, isa, {e.name for e in exports[isa]}, known)))
    _progress(len(rungs), steps, "compiling what is the same for all")
    texts = [*_ir(common.values()), f"@{storage} = global [{customop.storage_words(chosen)} x i64] zeroinitializer, align 64"]
    objects.append(elf.read_object(compile_module(texts, arch, "generic", {storage, *common}, known)))
    _progress(len(rungs) + 1, steps, "linking")
    library, imports = linker.link(objects, ["RegisterCustomOps"], IMPORTS, output.name, {"libm.so.6": _MATHEMATICS})
    output.write_bytes(library)
    _say(done=True, size=len(library), imports=imports, rungs=rungs)


def _say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _progress(step: int, steps: int, text: str) -> None:
    _say(step=step, steps=steps, text=text)


def main(arguments: Sequence[str]) -> int:
    """Build; a failure is one line of JSON with the reason."""
    try:
        build(Path(arguments[0]), arguments[1], arguments[2:])
    except Exception as error:
        import traceback

        traceback.print_exc()
        _say(error=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
