"""Mutations: a good input and a random.Random -> one that is probably wrong, by its bytes or by its structure."""

import copy
import io
import json
import pickletools
import random
import struct
import zipfile
import zlib

NUMBERS = (0, 1, 2, 7, 127, 255, 256, 4096, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1)
SNIPPETS = (b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff\0", b'"', b'""', b"'", b",", b"\r", b"\r\n", b"\n", b"\x1a",
            b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 100_000, b'{"a":' * 2000, b"\xff" * 8, b"\0" * 64,
            b"\xed\xa0\x80", b"\xe2\x80\xae", b"null", b"-1", b"#EXTM3U\n", b"ffconcat version 1.0\n", b"\\", b"%s%n")
ODD = (None, True, False, 0, -1, 1, 3, 1.5, 1e-300, 2**31, 2**63, 10**30, float("nan"), float("inf"), "", "x", "0",
       "\0", "\ud800", "é" * 3000, [], {}, [[]], [0], [1, 2], [None], [2**40] * 3, {"a": {}}, {"": None})


def bend(data: bytes, rng: random.Random, lures=()) -> bytes:
    """Bytes with one to four faults at random places, half of them near the beginning, where headers are."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        reach = len(data) if rng.random() < 0.5 else min(len(data), 256)
        at, end = sorted(rng.randrange(reach + 1) for _ in range(2))
        snippet = rng.choice((*SNIPPETS, *(lure.encode() for lure in lures)))
        number = rng.choice(NUMBERS).to_bytes(8, "big")[-rng.choice((1, 2, 4, 8)) :]
        number = number if rng.random() < 0.5 else number[::-1]
        kind = rng.randrange(10)
        if kind == 0 and data:
            for _ in range(rng.choice((1, 8, 64))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data = data[at:] + data[:at]
        else:
            data[at : len(data) if kind == 2 else at if kind in (3, 4) else end if kind < 7 else at + 8] = (
                b"", b"", b"", data[at:end], snippet, b"", bytes([rng.choice((0, 255))]) * (end - at), snippet, number,
                number)[kind]
    return bytes(data)


def bend_json(value, rng: random.Random, lures=()):
    """A JSON value of which a part has another type, another name, or is gone."""
    value = {"": copy.deepcopy(value)}
    places = [(value, "")]
    for holder, key in places:  # grows while it is walked: the parts of parts
        part = holder[key]
        if isinstance(part, (dict, list)):
            places += [(part, k) for k in (part if isinstance(part, dict) else range(len(part)))]
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0 and holder is not value:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict) and holder is not value:
        holder[str(key) + rng.choice((" ", "x", "\0"))] = holder.pop(key)
    elif kind == 2 and type(holder[key]) in (int, float):
        holder[key] *= rng.choice((-1, 0, 2, 3, 1000, 0.5))
    else:
        holder[key] = rng.choice((*ODD, *lures))
    return value[""]


def dumped(value, rng: random.Random) -> bytes:
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def bend_safetensors(data: bytes, rng: random.Random, lures=()) -> bytes:
    """Lengths, offsets, shapes, types, names and metadata that lie; numbers that are none."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    kind, names = rng.randrange(8), [name for name in header if name != "__metadata__"]
    entry, about = header[rng.choice(names)], header["__metadata__"]
    if kind == 0:
        header = bend_json(header, rng, lures)
    elif kind == 1:
        other = header[rng.choice(names)]["data_offsets"]
        entry["data_offsets"] = rng.choice(([0, 2**40], [8, 4], [-4, 4], other))
    elif kind == 2:
        entry["shape"] = rng.choice(([], [0], [2**40, 2**40], [*entry["shape"], 1], entry["shape"][::-1], [-1]))
    elif kind == 3:
        entry["dtype"] = rng.choice(("F64", "BF16", "I64", "F8_E4M3", "BOOL", "U8", "C64", "x"))
    elif kind == 4:
        header[rng.choice((rng.choice(names) + "x", "lora_up.weight", "etc.x", "\0", ""))] = entry
    elif kind == 5:
        key = rng.choice(sorted(about))
        bent = dumped(bend_json(json.loads(about["etc"]), rng, lures), rng).decode(errors="surrogatepass")
        about[key] = bent if key == "etc" else rng.choice(("", "x", "v"))
    elif kind == 6:  # NaN, infinities and large numbers, in float16
        for _ in range(rng.choice((1, 100, len(body) // 2))):
            at = rng.randrange(0, len(body) - 1, 2)
            body[at : at + 2] = rng.choice((b"\0\x7e", b"\0\x7c", b"\xff\x7b", b"\0\xfc"))
    else:
        return bend(data, rng, lures)
    text = dumped(header, rng)
    return struct.pack("<Q", rng.choice(NUMBERS) if rng.random() < 0.1 else len(text)) + text + body


def bend_pickle(data: bytes, rng: random.Random, lures=()) -> bytes:
    """A pickle in which an operation, or the number or text that it takes, is another one."""
    places, out, kind = [], bytearray(data), rng.randrange(4)
    try:
        places += [(op, at) for op, _, at in pickletools.genops(data)]
    except ValueError:
        return bend(data, rng, lures)
    op, at = rng.choice(places)
    if kind == 0:
        out[at] = ord(rng.choice(pickletools.opcodes).code)
    elif kind == 1 and op.arg:
        out[at + 1] = rng.randrange(256)
    else:
        codes = b"(", b".", b"]", b"}", b"N", b"0", b"a", b"b", b"R", b"Q", b"\x81", b"\x8a\xff"
        out[at:at] = rng.choice((*codes, b"cos\nsystem\n", b"cos\nsystem\n(X\x09\0\0\0touch rantR"))
    return bytes(out)


def bend_zip(data: bytes, rng: random.Random, lures=()) -> bytes:
    """A .ckpt as a zip: members gone, renamed, doubled, compressed, or changed inside."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    n, kind = rng.randrange(len(members)), rng.randrange(8)
    name, inside = members[n]
    if kind == 0:
        members.pop(n)
    elif kind == 1:
        members[n] = rng.choice(("../" * 9 + name, "/" + name, name.upper(), "x", *lures)), inside
    elif kind == 2:
        members[n] = name, bend(inside, rng, lures)
    elif kind == 3:
        members.insert(n, members[rng.randrange(len(members))])
    elif kind == 4:
        return bend(data, rng, lures)
    else:
        members = [(m, bend_pickle(inside, rng) if m.endswith(".pkl") else inside) for m, inside in members]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, inside in members:
            archive.writestr(name, inside)
    return out.getvalue()


TAR_FIELDS = ((0, 100), (100, 8), (124, 12), (124, 12), (148, 8), (156, 1), (156, 1), (157, 100), (257, 8), (345, 155))


def bend_tar(data: bytes, rng: random.Random, lures=()) -> bytes:
    """A tar in which a header says something else, mostly with a right checksum, or blocks are gone or stand twice."""
    out = bytearray(data)
    heads = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    at, (start, size), kind = rng.choice(heads), rng.choice(TAR_FIELDS), rng.randrange(8)
    if kind == 0:
        return bend(data, rng, lures)
    if kind == 1:
        end = at + 512 * rng.randrange(1, 4)
        out[at:end] = rng.choice((b"", out[at:end] * 2, b"\0" * (end - at)))
        return bytes(out)
    number = rng.choice(NUMBERS)
    numbers = b"%o" % abs(number), b"\x80" + abs(number).to_bytes(11, "big"), b"\xff" * size
    value = rng.choice((*map(str.encode, lures), *numbers, b"\0", b"%c" % rng.choice(b"01234567gxLKSDMV\0")))
    out[at + start : at + start + size] = value[:size].ljust(size, b"\0")
    if start != 148 and rng.random() < 0.9:
        total = sum(out[at : at + 512]) - sum(out[at + 148 : at + 156]) + 8 * 32
        out[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(out)


def bend_png(data: bytes, rng: random.Random, lures=()) -> bytes:
    """A PNG with right checksums, and chunks that are changed, gone, doubled or exchanged."""
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += size + 12
    n, kind, head = rng.randrange(len(chunks)), rng.randrange(5), chunks[0][1]
    more = ((b"tRNS", b"\0\1" * 200), (b"PLTE", b"abc"), (b"acTL", b"\xff" * 8),
            (b"iCCP", b"p\0\0" + zlib.compress(b"x")), (b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 10**7)),
            rng.choice(chunks))
    if kind == 0:
        chunks[0] = b"IHDR", rng.choice(NUMBERS[:14]).to_bytes(4, "big") + head[4:]
    elif kind == 1:
        depth, turns = rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 1, 9))
        chunks[0] = b"IHDR", head[:8] + bytes([depth, rng.randrange(8), 0, 0, turns])
    elif kind == 2:
        chunks[n] = chunks[n][0], bend(chunks[n][1], rng, lures)
    else:
        chunks[n : n + 1] = [chunks[n], rng.choice(more)][: rng.choice((0, 2))]
    return data[:8] + b"".join(
        struct.pack(">I", len(inside)) + name + inside + struct.pack(">I", zlib.crc32(name + inside))
        for name, inside in chunks)


def bend_boxes(data: bytes, rng: random.Random, lures=()) -> bytes:
    """An MP4 whose boxes have other sizes, names or numbers, are gone or stand twice."""
    boxes, spans, out = [], [(0, len(data))], bytearray(data)
    for at, end in spans:  # grows while it is walked
        while at + 8 <= end and 8 <= (size := int.from_bytes(data[at : at + 4], "big")) <= end - at:
            boxes.append((at, at + size))
            if data[at + 4 : at + 8] in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"dinf", b"edts", b"udta"):
                spans.append((at + 8, at + size))
            at += size
    (at, end), kind, number = rng.choice(boxes), rng.randrange(6), rng.choice(NUMBERS[:14]).to_bytes(4, "big")
    if kind == 0:
        out[at : at + 4] = number
    elif kind == 1:
        out[at + 4 : at + 8] = rng.choice((b"free", b"moov", b"dref", b"url ", b"cmov", b"mdat", b"stsz", b"uuid"))
    elif kind < 4:
        out[at:end] = out[at:end] * (0, 2)[kind - 2]
    else:
        place = rng.randrange(at + 4, end)
        out[place : place + 4] = number
    return bytes(out)


LINES = ("import os", "for x in 1,: pass", '"""', "\t", " x = 1", "\f", "# \u2028 é", "exec('1')", "\\", "x: int = 3",
         "*a, b = 1, 2", "del lr", "lr += 1", "(lr := 1)", "lr = seed = 1", "lr.x = 1", "lr[0] = 1")
VALUES = (*map(repr, ODD), "1e400", "1_000", "-0.0", "'a' 'b'", "(1,)", "{1, 2}", "f'{x}'", "x", "1 +", "0x10", "1j",
          "b'x'", "...", "__import__('os').system('touch ran')", "(" * 300, "-" * 5000 + "1", "9" * 5000, "2", "3",
          "7", "0.5")


def bend_source(text: str, rng: random.Random, lures=()) -> str:
    """A config file with other values, other names, other lines, or with a program in it."""
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 2))):
        n, kind = rng.randrange(len(lines)), rng.randrange(5)
        name, _, value = lines[n].partition("=")
        if kind < 2:
            lines[n] = f"{name}= {rng.choice((*VALUES, *map(repr, lures)))}"
        elif kind == 2:
            lines[n] = f"{name.strip()}{rng.choice(('x', 's', ' ', '.a', '[0]', ', b', ': int '))} = {value}"
        elif kind == 3:
            lines.insert(n, rng.choice((*LINES, *lines)))
        else:
            lines[n] = ""
    return rng.choice(("\n", "\n", "\n", "\r\n", "\r")).join(lines)
