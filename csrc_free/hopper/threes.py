"""Products of the determinant form, column by column, in the registers of an accumulator.

Columns stand as `ordered` puts them. A lane of four has the same two columns of every block of
eight: so all of a three where three blocks in a row hold its components. What is left over are one
or two blocks, whose columns of lanes 0, 1 and 2 are the components of threes, and those of lane 3
the trilinear ones. Of two such blocks lane 3 has a three, and a trilinear column behind it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _text(columns, is_x_paired, is_y_paired, has_sum, is_paired):
    """Return what computes o = x × y, plus a sum if there is one, of all numbers of a thread.

    Operands are in order o, x, y, sum: a register a number, or one for two columns of bfloat16.
    """
    blocks = columns // 8
    whole = blocks // 3 * 3
    numbers = 4 * blocks
    first_x = numbers // 2 if is_paired else numbers
    first_y = first_x + (numbers // 2 if is_x_paired else numbers)
    first_sum = first_y + (numbers // 2 if is_y_paired else numbers)
    operands = {"x": (first_x, is_x_paired), "y": (first_y, is_y_paired)}

    def taken_apart(name, register):
        """Return what declares two columns of bfloat16 as float32."""
        return (
            f".reg .b32 {name}_0, {name}_1; shl.b32 {name}_0, {register}, 16; "
            f"and.b32 {name}_1, {register}, 0xffff0000; "
        )

    def declared(name, source, place):
        """Return what declares `name`_0 and _1, the columns of an operand at a place."""
        first, is_paired = operands[source]
        if is_paired:
            return taken_apart(name, f"${first + place}")
        return "".join(
            f".reg .b32 {name}_{n}; mov.b32 {name}_{n}, ${first + 2 * place + n}; " for n in (0, 1)
        )

    def moved(name, source, place, way):
        """Return what declares the same of another lane, that is `way` of this one in its four."""
        first, is_paired = operands[source]
        if is_paired:
            moving = f"shfl.sync.idx.b32 {name}, ${first + place}, {way}, 0x1c1f, -1; "
            return f".reg .b32 {name}; {moving}" + taken_apart(name, name)
        return "".join(
            f".reg .b32 {name}_{n}; "
            f"shfl.sync.idx.b32 {name}_{n}, ${first + 2 * place + n}, {way}, 0x1c1f, -1; "
            for n in (0, 1)
        )

    def written(place, a, b, c, d):
        """Return what writes a · b - c · d to the columns at a place."""
        text = "{ .reg .f32 u, o_0, o_1; "
        for n in (0, 1):
            if has_sum:
                text += f"neg.f32 u, {c}_{n}; "
                text += f"fma.rn.f32 u, u, {d}_{n}, ${first_sum + 2 * place + n}; "
            else:
                text += f"mul.f32 u, {c}_{n}, {d}_{n}; neg.f32 u, u; "
            target = f"o_{n}" if is_paired else f"${2 * place + n}"
            text += f"fma.rn.f32 {target}, {a}_{n}, {b}_{n}, u; "
        if is_paired:
            text += f"cvt.rn.bf16x2.f32 ${place}, o_1, o_0; "
        return text + "} "

    def across_blocks(row, block):
        """Return the products of one row in three blocks."""
        places = [2 * (block + axis) + row for axis in range(3)]
        text = "{ "
        for axis, place in enumerate(places):
            text += declared(f"x{axis}", "x", place) + declared(f"y{axis}", "y", place)
        for axis, place in enumerate(places):
            ahead, behind = (axis + 1) % 3, (axis + 2) % 3
            text += written(place, f"x{ahead}", f"y{behind}", f"x{behind}", f"y{ahead}")
        return text + "} "

    def across_lanes(row):
        """Return the products of one row in the blocks that are left over."""
        places = [2 * block + row for block in range(whole, blocks)]
        text = "{ "
        for at, place in enumerate(places):
            for source in ("x", "y"):
                for way in ("next", "prev"):
                    text += moved(f"{source}{at}_{way}", source, place, way)
        if len(places) == 2:
            # Lane 3 had its own columns, first, second, third and trilinear, from the shuffles.
            for source in ("x", "y"):
                first, second, third = (f"{source}{n}" for n in (0, 1, 2))
                own = f"{source}0_next_0", f"{source}0_next_1", f"{source}1_next_0"
                for name, register in zip((first, second, third), own, strict=True):
                    text += f".reg .b32 {name}; mov.b32 {name}, {register}; "
                for way, of_lane in (
                    ("next", (second, third, first)),
                    ("prev", (third, first, second)),
                ):
                    names = (f"{source}{at}_{way}_{n}" for at, n in ((0, 0), (0, 1), (1, 0)))
                    for name, register in zip(names, of_lane, strict=True):
                        text += f"selp.b32 {name}, {name}, {register}, is_before; "
            text += "selp.b32 x1_prev_1, x1_prev_1, 0, is_before; "
        else:
            for n in (0, 1):
                text += f"selp.b32 x0_prev_{n}, x0_prev_{n}, 0, is_before; "
        for at, place in enumerate(places):
            text += written(place, f"x{at}_next", f"y{at}_prev", f"x{at}_prev", f"y{at}_next")
        return text + "} "

    # Lanes 1, 2, 0, 3 follow lanes 0 to 3, and 2, 0, 1, 3 come before them: two bits each. Told by
    # tid.x, ptxas uses no uniform registers in the whole kernel (1,016 bytes of spills for 400).
    lanes = (
        ".reg .pred is_before; .reg .u32 lane, next, prev; "
        "mov.u32 lane, %laneid; and.b32 lane, lane, 3; setp.lt.u32 is_before, lane, 3; "
        "shl.b32 lane, lane, 1; shr.u32 next, 0xC9, lane; and.b32 next, next, 3; "
        "shr.u32 prev, 0xD2, lane; and.b32 prev, prev, 3; "
    )
    rows = "".join(across_blocks(row, block) for block in range(0, whole, 3) for row in (0, 1))
    return "{ " + rows + lanes + "".join(across_lanes(row) for row in (0, 1)) + "}"


@gluon.constexpr_function
def _constraints(columns, is_x_paired, is_y_paired, has_sum, is_paired):
    """Return the operands' registers."""
    numbers = columns // 2
    found = ["=r"] * (numbers // 2) if is_paired else ["=f"] * numbers
    for is_operand_paired in (is_x_paired, is_y_paired):
        found += ["r"] * (numbers // 2) if is_operand_paired else ["f"] * numbers
    return ",".join(found + (["f"] * numbers if has_sum else []))


@gluon.jit
def cross(x, y):
    """Return x × y [rows, 64 or 128] in the threes and x ∘ y elsewhere, in float32.

    Either may be of float32 or bfloat16. Their layout is an accumulator's, or that of a left
    operand in registers.
    """
    N: gl.constexpr = x.shape[1]
    X: gl.constexpr = x.dtype == gl.bfloat16
    Y: gl.constexpr = y.dtype == gl.bfloat16
    return gl.inline_asm_elementwise(
        _text(N, X, Y, False, False), _constraints(N, X, Y, False, False), [x, y],
        dtype=gl.float32, is_pure=True, pack=N // 2,
    )  # fmt: skip


@gluon.jit
def rounded_cross(x, y):
    """Return what `cross` returns, in bfloat16."""
    N: gl.constexpr = x.shape[1]
    X: gl.constexpr = x.dtype == gl.bfloat16
    Y: gl.constexpr = y.dtype == gl.bfloat16
    return gl.inline_asm_elementwise(
        _text(N, X, Y, False, True), _constraints(N, X, Y, False, True), [x, y],
        dtype=gl.bfloat16, is_pure=True, pack=N // 2,
    )  # fmt: skip


@gluon.jit
def plus_cross(total, x, y):
    """Return a sum plus what `cross` returns, in float32."""
    N: gl.constexpr = x.shape[1]
    X: gl.constexpr = x.dtype == gl.bfloat16
    Y: gl.constexpr = y.dtype == gl.bfloat16
    return gl.inline_asm_elementwise(
        _text(N, X, Y, True, False), _constraints(N, X, Y, True, False), [x, y, total],
        dtype=gl.float32, is_pure=True, pack=N // 2,
    )  # fmt: skip
