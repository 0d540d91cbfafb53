"""
Codes of several codebooks, in one order and one numbering.

A frame is as long as a code of the coarsest codebook. levels says how many codes each codebook gives a frame:
(1, 2, 4) in SNAC at 24 kHz, (1,) * 8 in Mimi with eight codebooks. The codes of a frame stand depth first, a
code and then all that refines it:

    codebook 1   ┌──────── a ────────┐              place    0  1  2  3  4  5  6
    codebook 2   ┌─── b ───┬─── c ───┐      ─►      holds    a  b  d  e  c  f  g
    codebook 3   ┌─ d ┬─ e ┬─ f ┬─ g ┐

Place r of a frame holds r * codebook_size + code. So each place has ids of its own, and for a model a frame
is sum(levels) codes of one large codebook.

>>> frames = interleave([[9], [1, 2], [3, 4, 5, 6]], (1, 2, 4), 10)
>>> frames.tolist()
[[9, 11, 23, 34, 42, 55, 66]]
>>> [book.tolist() for book in deinterleave(frames, (1, 2, 4), 10)]
[[9], [1, 2], [3, 4, 5, 6]]
"""
import numpy as np


def codes_per_frame(description):
    """What codec.describe() returns -> how many codes a frame has: 1 where no levels are named"""
    return sum(description.get('levels', (1,)))


def places(levels):
    """-> [(codebook, which of its codes)] of each place in a frame: by start, then the coarser first"""
    found = sorted((i / n, book, i) for book, n in enumerate(levels) for i in range(n))
    return [(book, i) for _, book, i in found]


def interleave(books, levels, codebook_size):
    """
    Codes of each codebook, [n_frame * levels[k]] -> uint16 [n_frame, sum(levels)]. Raises ValueError for a
    codebook too many or too few, for lengths that do not fit together, for a code out of range.
    """
    if len(books) != len(levels):
        raise ValueError(f'{len(books)} codebooks, where the codec has {len(levels)}')
    books = [np.asarray(book, np.int64) for book in books]
    n_frame = len(books[0]) // levels[0]
    for k, (book, n) in enumerate(zip(books, levels), 1):
        if len(book) != n_frame * n:
            raise ValueError(f'levels of unequal length: codebook {k} has {len(book)} codes, '
                             f'{n_frame} frames of {n} need {n_frame * n}')
        if len(book) and not 0 <= book.min() <= book.max() < codebook_size:
            code = book.min() if book.min() < 0 else book.max()
            raise ValueError(f'codebook {k} has a code {code}, its codes are 0 to {codebook_size - 1}')
    columns = [books[book][i::levels[book]] + place * codebook_size
               for place, (book, i) in enumerate(places(levels))]
    return np.stack(columns, 1).astype(np.uint16)


def deinterleave(frames, levels, codebook_size):
    """The inverse: [n_frame, sum(levels)] -> [codes of each codebook]. Raises ValueError for a code that does
    not belong to its place."""
    n = sum(levels)
    frames = np.asarray(frames, np.int64).reshape(len(frames), n)
    firsts = np.arange(n) * codebook_size
    wrong = np.argwhere(frames // codebook_size != np.arange(n))
    if len(wrong):
        frame, place = wrong[0].tolist()
        raise ValueError(f'code {frames[frame, place]} at frame {frame}, place {place}: codes there are '
                         f'{firsts[place]} to {firsts[place] + codebook_size - 1}')
    return split(frames - firsts, levels)


def split(frames, levels):
    """[n_frame, sum(levels)] -> what belongs to each codebook, [n_frame * levels[k]]"""
    owners = np.array([book for book, _ in places(levels)])
    return [frames[:, owners == book].reshape(-1) for book in range(len(levels))]


def is_silent(codes, silence_codes):
    """
    Which frames are among silence_codes: [n_frame] with [k], or [n_frame, n] with [k, n] -> bool [n_frame].
    Of several codebooks the finer ones follow the faintest noise, so in practice only digital silence has a
    frame that is known; a quiet room counts as sound.
    """
    frames = np.asarray(codes).reshape(len(codes), 1, -1 if len(codes) else 1)
    known = np.asarray(silence_codes).reshape(1, len(silence_codes), -1)
    return (frames == known).all(-1).any(-1)
