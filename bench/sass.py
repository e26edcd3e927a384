"""What a compiled kernel asks of the hardware, read from its machine code; nothing is run.

The figures are those of the cheapest way round one tile: control flow is rebuilt from the disassembly, the tile's
block is the one that loads most among those of a loop, and the cost of a tile is the shortest cycle through it.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS_PER_SM = 65536
THREADS_PER_SM = {"sm_80": 2048, "sm_86": 1536, "sm_89": 1536, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536}
BLOCKS_PER_SM = {"sm_80": 32, "sm_86": 16, "sm_89": 24, "sm_90": 32, "sm_100": 32, "sm_120": 24}
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\d+|@!?U?PT)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_x_\d+):")
INTEGER = ("IADD", "VIADD", "LOP", "SHF", "PRMT", "LEA", "SGXT", "MOV", "SEL", "FSEL", "PLOP")
INTEGER += ("ISETP", "FSETP", "FSET", "FMNMX", "IMNMX", "VIMNMX")
"""Additions, logic, shifts, comparisons and selections, which share one unit; IMAD runs beside them."""
CONVERSIONS = ("I2F.", "I2F ", "F2I", "F2F.", "FRND")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, None: 4, "64": 8, "128": 16}


@dataclass
class Instruction:
    predicate: str | None
    opcode: str
    operands: str

    @property
    def access(self) -> tuple[str, int] | None:
        """("LDG" or "STG", bytes per thread) of an access to global memory."""
        if not self.opcode.startswith(("LDG", "STG")):
            return None
        width = next((part for part in self.opcode.split(".") if part in WIDTHS), None)
        return self.opcode[:3], WIDTHS[width]

    def registers(self) -> list[int]:
        return [int(r) for r in re.findall(r"\bR(\d+)\b", self.operands)]


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)

    def count(self, opcode: str) -> int:
        return sum(i.opcode.startswith(opcode) for i in self.instructions)

    def widths(self, kind: str) -> list[int]:
        return [a[1] for i in self.instructions if (a := i.access) and a[0] == kind]


def tool(name: str, *arguments: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run([TOOLS / name, *arguments, file.name], capture_output=True, text=True, check=True)
    return result.stdout


def basic_blocks(text: str) -> list[Block]:
    """Control-flow graph of ``nvdisasm -c`` output; block 0 is the entry."""
    blocks, labels, jumps = [Block()], {}, []
    for line in text.splitlines():
        label = LABEL.match(line)
        if label:
            if blocks[-1].instructions:
                blocks[-1].successors.append(len(blocks))
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
            continue
        match = INSTRUCTION.match(line)
        if not match:
            continue
        instruction = Instruction(match[2], match[3], match[4])
        blocks[-1].instructions.append(instruction)
        name = instruction.opcode.split(".")[0]
        if name not in ("BRA", "EXIT", "RET"):
            continue
        if name == "BRA":
            jumps.append((len(blocks) - 1, re.search(r"\.L_x_\d+", instruction.operands)[0]))
        if instruction.predicate or re.match(r"!?U?P\d", instruction.operands):
            blocks[-1].successors.append(len(blocks))  # may fall through
        blocks.append(Block())
    for block, label in jumps:
        blocks[block].successors.append(labels[label])
    for block in blocks:
        block.successors = [s for s in block.successors if s < len(blocks)]
    return blocks


def shortest_path(blocks: list[Block], start: int, stops: set[int]) -> list[int]:
    """Blocks after ``start`` up to the first of ``stops``, fewest instructions; [] if none is reached."""
    queue = [(len(blocks[s].instructions), s, [s]) for s in blocks[start].successors]
    heapq.heapify(queue)
    seen = set()
    while queue:
        cost, at, path = heapq.heappop(queue)
        if at in stops:
            return path
        if at not in seen:
            seen.add(at)
            for s in blocks[at].successors:
                heapq.heappush(queue, (cost + len(blocks[s].instructions), s, [*path, s]))
    return []


def bytes_before_first_use(instructions: list[Instruction]) -> int:
    """Bytes per thread that are loaded from global memory before the first instruction that needs any of them."""
    pending: set[int] = set()
    total = 0
    for instruction in instructions:
        registers = instruction.registers()
        access = instruction.access
        if access and access[0] == "LDG":
            if pending & set(registers[1:]):
                break
            pending |= set(range(registers[0], registers[0] + max(1, access[1] // 4)))
            total += access[1]
        elif pending & set(registers):
            break
    return total


@dataclass(frozen=True)
class Profile:
    """Per thread and launch where not said otherwise.

    Args:
        registers, spill_bytes, shared_bytes: as ptxas allocated them (shared: per block).
        resident_threads: per SM.
        tile_instructions: issued for one tile, the loop around it included.
        tile_barriers: of the block's threads, per tile.
        tile_mufu, tile_conversions, tile_integer: those of them that go to the special-function and integer units.
        once_instructions: before the first tile and after the last one.
        widths: bytes of the tile's accesses to global memory.
        bytes_in_flight: per SM: loads issued before the first use of any, times the resident threads.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    resident_threads: int
    tile_instructions: int
    tile_barriers: int
    tile_mufu: int
    tile_conversions: int
    tile_integer: int
    once_instructions: int
    widths: dict[str, list[int]]
    bytes_in_flight: int


def profile(cubin: bytes, target: str, threads: int) -> Profile:
    """Read the machine code of one kernel that runs in blocks of ``threads``."""
    usage = tool("cuobjdump", "-res-usage", cubin=cubin)
    registers, stack, shared, local = (
        int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "SHARED", "LOCAL")
    )
    blocks = basic_blocks(tool("nvdisasm", "-c", cubin=cubin))

    looping = [b for b in range(len(blocks)) if shortest_path(blocks, b, {b})]
    tile = max(looping or range(len(blocks)), key=lambda b: sum(blocks[b].widths("LDG")))
    exits = {b for b, block in enumerate(blocks) if any(i.opcode == "EXIT" for i in block.instructions)}
    cycle = shortest_path(blocks, tile, {tile}) or [tile]
    before = shortest_path(blocks, 0, {tile})[:-1] if tile else []
    after = shortest_path(blocks, tile, exits)
    looped = [i for b in cycle for i in blocks[b].instructions]
    once = [i for b in [0, *before, *after] for i in blocks[b].instructions if b not in cycle]
    by_registers = REGISTERS_PER_SM // (-(-registers // 8) * 8 * threads)
    resident = min(by_registers, BLOCKS_PER_SM[target], THREADS_PER_SM[target] // threads) * threads
    return Profile(
        registers=registers,
        spill_bytes=stack + local,
        shared_bytes=shared,
        resident_threads=resident,
        tile_instructions=len(looped),
        tile_barriers=sum(i.opcode.startswith("BAR") for i in looped),
        tile_mufu=sum(i.opcode.startswith("MUFU") for i in looped),
        tile_conversions=sum(f"{i.opcode} ".startswith(CONVERSIONS) for i in looped),
        tile_integer=sum(i.opcode.startswith(INTEGER) for i in looped),
        once_instructions=len(once),
        widths={kind: sorted(blocks[tile].widths(kind), reverse=True) for kind in ("LDG", "STG")},
        bytes_in_flight=bytes_before_first_use(blocks[tile].instructions) * resident,
    )
