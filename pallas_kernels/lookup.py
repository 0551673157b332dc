"""Codes to numbers by the table of all bytes, a copy of it for each lane."""

from pallas_kernels import emit


def pairs_of(word, lane: "emit.Int", table: "emit.Int") -> list:
    """Returns the four pairs of numbers that four bytes of codes stand for.

    Entry e of lane l lies at byte 256 e + 4 l, so that an offset is the byte of codes
    above the lane's, one permute, and 32 lanes look up in 32 banks.

    Args:
        word: four bytes of codes.
        lane: the lane's offset, 4 l.
        table: address of the table.
    """
    lookups = "".join(
        f"prmt.b32 a, $4, $5, {0x7604 + 16 * i}; add.u32 a, a, $6; "
        f"ld.shared.b32 ${i}, [a]; "
        for i in range(4)
    )
    text = "{.reg .b32 a; " + lookups + "}"
    return list(emit.ptx(text, word, lane.value, table.value, out="rrrr"))
