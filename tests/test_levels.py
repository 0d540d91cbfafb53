"""Several codebooks in one order and one numbering, and back."""
import doctest

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import levels as module
from common.levels import codes_per_frame, deinterleave, interleave, is_silent, places
from data.dialogues import Dialogues, save_dialogues
from data.loader import Loader
from flatten import check, get_layout
from vocabulary import Vocabulary


def test_the_docstring():
    assert doctest.testmod(module)[0] == 0 < doctest.testmod(module)[1]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 6), st.integers(1, 4096),
       st.integers(0, 2 ** 32 - 1))
def test_there_and_back(levels, n_frame, size, seed):
    """Whatever the levels, also such as 2 and 3; and each place keeps to its own range."""
    size = min(size, 2 ** 16 // sum(levels))
    books = [np.random.default_rng(seed).integers(0, size, n_frame * n) for n in levels]
    frames = interleave(books, levels, size)
    assert frames.dtype == np.uint16 and frames.shape == (n_frame, sum(levels))
    assert (frames // size == np.arange(sum(levels))).all()
    for book, again in zip(books, deinterleave(frames, levels, size), strict=True):
        assert again.tolist() == book.tolist()
    assert [book.tolist() for book in deinterleave(frames.tolist(), levels, size)] == [
        book.tolist() for book in books]


def test_the_order_is_that_of_others():
    """Depth first. For SNAC this is what Mini-Omni and Orpheus do; the latter numbers places as we do."""
    c1, c2, c3 = [1, 2], [10, 11, 12, 13], [100, 101, 102, 103, 104, 105, 106, 107]
    frames = interleave([c1, c2, c3], (1, 2, 4), 4096)
    raw = frames - np.arange(7) * 4096
    assert raw.tolist() == [[1, 10, 100, 101, 11, 102, 103], [2, 12, 104, 105, 13, 106, 107]]
    assert interleave([[5, 6], [7, 8]], (1, 1), 1024).tolist() == [[5, 1031], [6, 1032]]
    # 32 and 44.1 kHz: four levels, a binary tree
    half = [[(1, i), (2, 2 * i), (3, 4 * i), (3, 4 * i + 1), (2, 2 * i + 1), (3, 4 * i + 2), (3, 4 * i + 3)]
            for i in range(2)]
    assert places((1, 2, 4, 8)) == [(0, 0), *half[0], *half[1]]
    # Step-Audio's two streams, 2 : 3 of a frame
    assert places((2, 3)) == [(0, 0), (1, 0), (1, 1), (0, 1), (1, 2)]
    assert codes_per_frame({}) == 1 and codes_per_frame(dict(levels=[1, 2, 4])) == 7


@pytest.mark.parametrize('books, message', [
    ([[1], [2]], '2 codebooks, where the codec has 3'),
    ([[1], [2, 3], [4] * 4, [5]], '4 codebooks, where the codec has 3'),
    ([[1] * 4, [2] * 7, [3] * 16], 'levels of unequal length: codebook 2 has 7 codes, 4 frames of 2 need 8'),
    ([[1], [2, 3], [4, 5, 6, 99]], 'codebook 3 has a code 99, its codes are 0 to 9'),
    ([[1], [2, -1], [4, 5, 6, 7]], 'codebook 2 has a code -1, its codes are 0 to 9'),
])
def test_books_that_do_not_fit(books, message):
    with pytest.raises(ValueError) as error:
        interleave(books, (1, 2, 4), 10)
    assert str(error.value) == message


def test_a_code_in_the_wrong_place():
    frames = interleave([[1, 2], [3, 4]], (1, 1), 10)
    frames[1, 1] = 7
    with pytest.raises(ValueError, match='^code 7 at frame 1, place 1: codes there are 10 to 19$'):
        deinterleave(frames, (1, 1), 10)


def test_silence():
    one = np.array([17, 4], np.uint16)
    assert is_silent([17, 3, 4], one).tolist() == [True, False, True]
    assert is_silent([], one).tolist() == []
    several = np.array([[1, 12], [2, 13]], np.uint16)
    # all of a frame has to agree with one frame: 1, 13 is none of them
    assert is_silent(np.array([[1, 12], [1, 13], [2, 13]]), several).tolist() == [True, False, True]
    assert is_silent(np.empty((0, 2)), several).tolist() == []


# ------------------------------------------------------------------------------------------------------------
# on disk, and in the loader

SEVERAL = dict(name='toy', rate_hz=12.5, n_codes=70, sample_rate=24000, fingerprint='0', levels=[1, 2, 4])


def make_frames(n_frame, seed=0):
    codes = np.random.default_rng(seed).integers(0, 10, (n_frame, 7))
    return (codes + np.arange(7) * 10).astype(np.uint16)


def test_frames_on_disk(tmp_path):
    """Arrays and nested lists are stored alike, flat; what is read are views into the file."""
    user, assistant = make_frames(9), make_frames(9, 1)
    turns = [dict(role='user', start=0, end=9, text='hi')]
    rows = [dict(id='arrays', user=user, assistant=assistant, turns=turns),
            dict(id='lists', user=user.tolist(), assistant=assistant.tolist(), turns=turns),
            dict(id='one side', user=user[:4], assistant=[], turns=[]),
            dict(id='nothing', user=user[:0], assistant=assistant[:0], turns=[])]
    save_dialogues(str(tmp_path / 'train.arrow'), rows, SEVERAL)
    dialogues = Dialogues(str(tmp_path), 'train')
    assert dialogues.codes_per_frame == 7 and dialogues.codec == SEVERAL
    assert [n.tolist() for n in dialogues.n_frame] == [[9, 9, 4, 0], [9, 9, 0, 0]]
    for row, read in zip(rows, dialogues):
        for role in ('user', 'assistant'):
            assert read[role].dtype == np.uint16 and read[role].tolist() == np.asarray(row[role]).tolist()
            assert read[role].shape[1:] == (7,) and not read[role].flags.owndata
        check(read, SEVERAL['n_codes'], 7)
    stored = pa.ipc.open_file(str(tmp_path / 'train.arrow')).read_all()
    assert stored.schema.field('user').type == pa.list_(pa.uint16())
    assert stored['user'][1].as_py() == user.reshape(-1).tolist()
    message = r"'arrays': the user channel has shape \(9, 7\), and codec toy 1 codes a frame"
    with pytest.raises(ValueError, match=message):
        save_dialogues(str(tmp_path / 'train.arrow'), rows, dict(SEVERAL, levels=[1]))


def test_a_slice_of_a_file(tmp_path):
    """pyarrow's slices keep the values of their neighbours."""
    rows = [dict(id=str(i), user=make_frames(i), assistant=make_frames(i, 1), turns=[]) for i in range(6)]
    path = str(tmp_path / 'train.arrow')
    save_dialogues(path, rows, SEVERAL)
    table = pa.ipc.open_file(path).read_all()
    with pa.OSFile(path, 'wb') as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.slice(0, 2))
        writer.write_table(table.slice(2, 3))
    dialogues = Dialogues(str(tmp_path), 'train')
    assert [d['user'].tolist() for d in dialogues] == [row['user'].tolist() for row in rows[:5]]


def test_channels_that_are_no_frames(tmp_path):
    good = dict(id='good', user=make_frames(3), assistant=make_frames(3), turns=[])
    bad = dict(id='bad', user=make_frames(3), assistant=make_frames(3).reshape(-1)[:-1], turns=[])
    save_dialogues(str(tmp_path / 'train.arrow'), [good, bad], SEVERAL)
    with pytest.raises(ValueError) as error:
        Dialogues(str(tmp_path), 'train')
    assert str(error.value) == (f"{tmp_path}/train.arrow is not a file of dialogues (record 'bad' has 20 "
                                'assistant codes, and a frame has 7); prepare it again')


@pytest.mark.parametrize('n_code', [1, 2, 4])
def test_noise_stays_in_its_place(tmp_path, small_tokenizer, n_code):
    """user_noise draws among the codes of the same codebook: 32 codes are 1, 2 or 4 places of 32, 16 or 8."""
    rng = np.random.default_rng(0)
    rows = [dict(id=str(i), user=rng.integers(0, 32, 99), assistant=[0] * 99, turns=[]) for i in range(9)]
    save_dialogues(str(tmp_path / 'train.arrow'), rows, dict(SEVERAL, n_codes=32, levels=[1]))
    dialogues = Dialogues(str(tmp_path), 'train')
    dialogues.codes_per_frame = n_code
    vocab = Vocabulary.load(small_tokenizer, 32)
    loaders = [Loader(dialogues, [get_layout('duplex2')], vocab, 256, 8, user_noise=share)
               for share in (0.0, 0.5)]
    clean, noisy = (loader.next_batch().idx.numpy() - vocab.code_start for loader in loaders)
    before, after, size = clean[clean != noisy], noisy[clean != noisy], 32 // n_code
    assert (before // size == after // size).all() and len(np.unique(after)) == 32
    assert 0.1 < len(after) / clean.size < 0.3
