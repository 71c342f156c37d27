"""Records of a large text: lines, or rows of a CSV file, of which only the places are kept in memory."""

import codecs
import csv
import io
import itertools
import os
from array import array

import numpy as np

from clips.decode import Bad


class Records:
    """The lines of a text, or the rows of a CSV file, without blank ones: `records[i]` is the text of one.

    A record is read when it is asked for; of each is kept where it begins, its byte and its line. Raises Bad where one
    is not text in UTF-8.

    path  the file: mapped and never copied, not even into worker processes; or
    text  the text itself
    rows  whether it is CSV, where a row may have several lines
    """

    def __init__(self, path: str, text: bytes | None = None, rows=False):
        self.path = path
        if text is None and os.path.getsize(path):
            self.text = np.memmap(path, np.uint8, "r")
        else:
            self.text = np.frombuffer(text or b"", np.uint8)
        self.starts = line_starts(self.text)
        self.lines = np.arange(len(self.starts))
        if rows:
            with io.BytesIO(text) if text is not None else open(path, "rb") as file:
                self.lines = row_starts(file, len(self.starts))
        first = self.text[self.starts[self.lines]]
        self.lines = self.lines[(first != LF) & (first != CR)]  # a blank line belongs to the record before it
        self.starts = self.starts[self.lines]

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i: int) -> str:
        first, last = self.starts[i], self.starts[i + 1] if i + 1 < len(self) else len(self.text)
        try:
            text = self.text[first:last].tobytes().decode()
        except ValueError as error:
            raise Bad("not text in UTF-8") from error
        if "\0" in text:
            raise Bad("not text in UTF-8")
        return text

    def line(self, i: int) -> int:
        """The line of the text, from 1 on, in which a record begins."""
        return int(self.lines[i]) + 1

    def __getstate__(self):
        return self.__dict__ | ({"text": None} if isinstance(self.text, np.memmap) else {})

    def __setstate__(self, state):
        self.__dict__ |= state
        if self.text is None:
            self.text = np.memmap(self.path, np.uint8, "r")


LF, CR = b"\n\r"


def line_starts(text: np.ndarray, chunk=1 << 20) -> np.ndarray:
    """The first byte of each line, behind "\\n", "\\r\\n", "\\r" or a byte order mark."""
    starts = [[len(codecs.BOM_UTF8) if text[:3].tobytes() == codecs.BOM_UTF8 else 0]]
    for at in range(0, len(text), chunk):
        part = np.asarray(text[at : at + chunk + 1])
        ends = np.flatnonzero(part[:chunk] <= CR)  # few bytes are
        here, behind = part[ends], part[np.minimum(ends + 1, len(part) - 1)]
        starts.append(ends[(here == LF) | (here == CR) & (behind != LF)] + at + 1)
    starts = np.concatenate(starts)
    return starts[starts < len(text)]


def row_starts(file, lines: int) -> np.ndarray:
    """The line, from 0 on, in which each row of a CSV file begins, where Python's csv module says that it does.

    Raises ValueError, naming that line, on a row with a quote that is never closed: it has swallowed others.

    lines  how many there are
    """
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    rows, starts = csv.reader(itertools.chain(text, ["end"])), array("q", [0])  # a row more, unless it is swallowed
    try:
        starts.extend(rows.line_num for _ in rows)
    except csv.Error as error:
        raise ValueError(f"line {starts[-1] + 1}: {error}: is a quote not closed?") from error
    if starts[-2] != lines:
        raise ValueError(f"line {starts[-2] + 1}: a quote is not closed")
    return np.array(starts[:-2])


def csv_row(text: str) -> list[str]:
    """The fields of a row, as the csv module reads them.

    Raises Bad where text is behind a closing quote in a row of several lines: some quote is stray, and the row has
    swallowed others; or in one with \\", which some programs write for "".
    """
    try:
        return next(csv.reader([text], strict=any(mark in text.rstrip("\r\n") for mark in ("\r", "\n", '\\"'))))
    except csv.Error as error:
        raise Bad("not a line of CSV: is a quote not closed, or not doubled?") from error
