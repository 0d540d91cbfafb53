"""Rows of packed dialogues: nothing lost, nothing twice, neighbours unseen, positions that come back."""
import json
import pathlib
import shutil
import threading

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import CODEC, make_dialogues
from hypothesis import given, settings
from hypothesis import strategies as st

import data.loader as loader_module
from data.dialogues import Dialogues, save_dialogues
from data.loader import STREAMS, Loader, Mixture, Prefetch, fill, pack
from flatten import check, flatten, get_layout, lay_prompt
from vocabulary import Vocabulary


def make_loader(folder, layouts=('duplex3',), block_size=256, **options):
    dialogues = Dialogues(str(folder), options.pop('split', 'train'))
    vocab = Vocabulary.load(folder / 'tokenizer', dialogues.codec['n_codes'])
    return Loader(dialogues, [get_layout(name) for name in layouts], vocab, block_size,
                  options.pop('batch_size', 2), **options)


def documents_of(batch):
    """The sequences in a batch, as (fed ids, {place in the sequence: target})."""
    B, T = batch.idx.shape
    targets = dict(zip(batch.learn.tolist(), batch.targets.tolist()))
    found = []
    for b in range(B):
        for d in batch.doc[b].unique().tolist():
            at = (batch.doc[b] == d).nonzero().flatten().tolist()
            assert at == list(range(at[0], at[-1] + 1)) and batch.pos[b, at].tolist() == list(range(len(at)))
            places = {t - at[0]: targets[b * T + t] for t in at if b * T + t in targets}
            if places:
                found.append((tuple(batch.idx[b, at].tolist()), tuple(sorted(places.items()))))
    return found


def expected(loader, layout):
    out = []
    for i in range(len(loader.dialogues)):
        for document in flatten(loader.dialogues[i], layout, loader.vocab):
            step = (loader.block_size + 1) // layout.period * layout.period if layout.period else len(
                document.ids)
            for at in range(0, len(document.ids), step):
                ids, learned = document.ids[at:at + step], document.learned[at:at + step]
                places = tuple((t, int(ids[t + 1])) for t in range(len(ids) - 1) if learned[t + 1])
                out.append((tuple(ids[:-1].tolist()), places))
    return sorted(out)


@pytest.mark.parametrize('layout', ['asr', 'tts', 'half_duplex', 'duplex3', 'duplex2'])
def test_an_epoch_is_every_document_once(small_data, layout):
    loader = make_loader(small_data, [layout])
    got = [document for batch in loader.epoch() for document in documents_of(batch)]
    assert sorted(got) == expected(loader, get_layout(layout))


@pytest.mark.parametrize('world_size', [1, 3])
def test_an_epoch_has_one_shape(small_data, world_size):
    """Also its last batch, as a compiled model takes a minute for another shape. All ranks have as many."""
    ranks = [list(make_loader(small_data, batch_size=4, rank=rank, world_size=world_size).epoch())
             for rank in range(world_size)]
    n_row = make_loader(small_data).counts['rows']
    assert n_row % 4 and [len(batches) for batches in ranks] == [-(-n_row // (4 * world_size))] * world_size
    for batches in ranks:
        assert {batch.idx.shape for batch in batches} == {(4, ranks[0][0].idx.shape[1])}
    learned = sum(len(batch.learn) for batches in ranks for batch in batches)
    assert learned == sum(len(batch.learn) for batch in make_loader(small_data, padded=False).epoch())


def test_ranks_share_nothing_and_miss_nothing(small_data):
    """Three ranks' epochs together are one epoch; their batches side by side are the batches of one
    process."""
    alone, ranks = make_loader(small_data, batch_size=6
                               ), [make_loader(small_data, rank=r, world_size=3) for r in range(3)]
    whole = sorted(d for batch in alone.epoch() for d in documents_of(batch))
    assert sorted(d for loader in ranks for batch in loader.epoch() for d in documents_of(batch)) == whole
    for _ in range(20):     # over several epochs
        together = [d for loader in ranks for d in documents_of(loader.next_batch())]
        assert sorted(together) == sorted(documents_of(alone.next_batch()))


def test_each_epoch_has_its_own_order_and_a_seed_repeats_it(small_data):
    def read(n, **options):
        loader = make_loader(small_data, **options)
        return [loader.next_batch().idx for _ in range(n)], loader
    first, loader = read(40)
    assert loader.state['epoch'] >= 1
    again, _ = read(40)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    other, _ = read(40, seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize('n_before', [1, 7, 23])
def test_position_comes_back(small_data, n_before):
    loader = make_loader(small_data)
    loader.window = 16      # several windows an epoch
    loader = make_loader(small_data)
    for _ in range(n_before):
        loader.next_batch()
    state = json.loads(json.dumps(loader.state))
    rest = [loader.next_batch() for _ in range(30)]
    resumed = make_loader(small_data)
    resumed.state = state
    for batch in rest:
        assert all(torch.equal(a, b) for a, b in zip(batch[:6], resumed.next_batch()[:6]))


def test_noise_touches_what_is_heard_only(small_data):
    """A tenth of the user's codes become any other; what is learned stays, and ranks see what one process
    sees."""
    clean, noisy = make_loader(small_data, batch_size=4), make_loader(small_data, batch_size=4,
                                                                      user_noise=0.1)
    ranks = [make_loader(small_data, batch_size=2, rank=r, world_size=2, user_noise=0.1) for r in range(2)]
    n_changed = n_heard = 0
    for _ in range(20):
        a, b, halves = clean.next_batch(), noisy.next_batch(), [loader.next_batch() for loader in ranks]
        assert torch.equal(a.targets, b.targets) and torch.equal(a.learn, b.learn)
        assert torch.equal(b.idx[0::2], halves[0].idx) and torch.equal(b.idx[1::2], halves[1].idx)
        heard = torch.ones(a.idx.numel(), dtype=bool)
        # an id that was a target is not a user's
        heard[a.learn + 1 - (a.learn + 1 == len(heard)).int()] = False
        heard &= a.idx.flatten() >= clean.vocab.code_start
        changed = (a.idx != b.idx).flatten()
        assert not (changed & ~heard).any() and (b.idx.flatten()[heard] >= clean.vocab.code_start).all()
        n_changed, n_heard = n_changed + changed.sum().item(), n_heard + heard.sum().item()
    assert 0.08 < n_changed / n_heard < 0.11      # one in 32 is replaced by itself


def test_long_dialogues_are_cut_at_chunk_borders(small_data):
    loader = make_loader(small_data, block_size=64)      # 65 ids hold 2 chunks of 22
    for batch in loader.epoch():
        for ids, _ in documents_of(batch):
            assert (len(ids) + 1) % 22 == 0 and len(ids) < 44


def test_a_prompt_stands_before_the_first_chunk(tmp_path, small_tokenizer):
    """Fed, not learned, in the first row of a dialogue only. Without room for it and a chunk, the dialogue is
    too long."""
    shutil.copytree(small_tokenizer, tmp_path / 'tokenizer')
    first, second = make_dialogues(2)
    save_dialogues(str(tmp_path / 'train.arrow'), [first, dict(second, prompt='you are kind.')], CODEC)
    assert 'prompt' not in Dialogues(str(tmp_path), 'train')[0]
    loader = make_loader(tmp_path, block_size=64)       # 65 ids hold 2 chunks of 22
    head = lay_prompt('you are kind.', loader.vocab)
    assert 4 < len(head) < 21
    documents = [document for batch in loader.epoch() for document in documents_of(batch)]
    (ids, targets), = [document for document in documents if document[0][0] == head[0]]
    assert list(ids[:len(head)]) == head and (len(ids) + 1 - len(head)) % 22 == 0
    assert min(at for at, _ in targets) == len(head) + 9        # after the first chunk of the user
    assert sum(len(ids) + 1 for ids, _ in documents) == loader.counts['tokens']
    assert loader.counts['tokens'] == sum(len(flatten(dialogue, get_layout('duplex3'), loader.vocab)[0].ids)
                                          for dialogue in (loader.dialogues[0], loader.dialogues[1]))
    short = make_loader(tmp_path, block_size=len(head) + 20)
    assert short.counts['too_long'] == 1 and short.counts['documents'] > 0


def test_streams_and_seconds(small_data):
    """44 bytes of text more or less: what is counted as silence, speech and text adds up, and so do the
    seconds."""
    loader = make_loader(small_data)
    sec = sum(batch.sec for batch in loader.epoch())
    frames = sum(-(-len(loader.dialogues[i]['user']) // 10) * 10 for i in range(60))
    assert sec == pytest.approx(frames / CODEC['rate_hz'], abs=1e-6)
    for batch in loader.epoch():
        for target, stream in zip(batch.targets.tolist(), batch.stream.tolist()):
            kind = 'speech' if target >= loader.vocab.code_start else 'text'
            if target in [loader.vocab.control[f'<|silent_{name}|>'] for name in ('text', 'speech')]:
                kind = 'silence'
            assert STREAMS[stream] == kind


@given(st.lists(st.integers(1, 100), min_size=1, max_size=200))
@settings(max_examples=100, deadline=None)
def test_packing(lengths):
    bins = pack(lengths, 100)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= 100 for members in bins)
    # two such rows would have been one
    assert sum(sum(lengths[i] for i in members) <= 50 for members in bins) <= 1


def waste(lengths, capacity, window=4096):
    rows = []
    for at in range(0, len(lengths), window):
        rows += [[lengths[at + i] for i in row] for row in pack(lengths[at:at + window], capacity)]
    assert sorted(n for row in rows for n in row) == sorted(lengths) and max(map(sum, rows)) <= capacity
    return 1 - sum(lengths) / (capacity * len(rows))


@pytest.mark.parametrize('name, capacity, most', [('lengths_asr_1024', 1024, 0.0029),
                                                  ('lengths_dialogue_8192', 8192, 0.0063)])
def test_packing_wastes_less_than_trl(name, capacity, most):
    """TRL 1.16's best is one batch of all 20,000 documents; ours are windows. A document of n ids takes n - 1
    places."""
    path = pathlib.Path(__file__).parent.parent / f'../shared/data/packing/{name}.npy'
    if not path.exists():
        pytest.skip(f'no {path}')
    lengths = np.load(path).astype(int)
    assert waste(lengths.tolist(), capacity) < most and waste((lengths - 1).tolist(), capacity) < most


@pytest.mark.parametrize('mean, sigma, capacity, most', [(5.5, 0.7, 1024, 0.0029), (7.7, 0.6, 8192, 0.0063)])
def test_packing_wastes_little(mean, sigma, capacity, most):
    """Log-normal lengths, as of a corpus read aloud and of dialogues; best-fit decreasing alone wastes 0.4 %
    and 0.8 %."""
    lengths = np.clip(np.random.default_rng(0).lognormal(mean, sigma, 8192).astype(int), 20,
                      capacity).tolist()
    assert waste(lengths, capacity) < most


def test_rows_are_filled_exactly():
    """By hand, into 10: best-fit decreasing puts 6 5 3 2 2 2 into three rows, 6 3, 5 2 2 and 2, where two do:
    6 2 2, 5 3 2."""
    lengths = [6, 5, 3, 2, 2, 2]
    assert [sorted(lengths[i] for i in row) for row in fill(range(6), lengths, 10)] == [[2, 2, 6], [2, 3, 5]]
    assert len(pack(lengths, 10)) == 2


def test_one_sided_utterances_are_for_alignment_only(tmp_path, small_tokenizer):
    import shutil
    shutil.copytree(small_tokenizer, tmp_path / 'tokenizer')
    utterance = dict(id='u', user=[1, 2, 3], assistant=[],
                     turns=[dict(role='user', start=0, end=3, text='hi')])
    save_dialogues(str(tmp_path / 'train.arrow'), [utterance, *make_dialogues(1)], CODEC)
    assert len(list(make_loader(tmp_path, ['duplex3']).epoch())) == 1
    assert make_loader(tmp_path, ['duplex3']).counts['one_sided'] == 1
    assert make_loader(tmp_path, ['asr'], block_size=256).counts['documents'] == 3


def test_files_in_parts(tmp_path, small_tokenizer):
    import shutil
    shutil.copytree(small_tokenizer, tmp_path / 'tokenizer')
    rows = list(make_dialogues(5))
    save_dialogues(str(tmp_path / 'train-00000-of-00002.arrow'), rows[:2], CODEC)
    with pytest.raises(ValueError, match='1 of the 2 files'):
        Dialogues(str(tmp_path), 'train')
    save_dialogues(str(tmp_path / 'train-00001-of-00002.arrow'), rows[2:], CODEC)
    dialogues = Dialogues(str(tmp_path), 'train')
    assert [dialogues[i]['id'] for i in range(len(dialogues))] == [row['id'] for row in rows]
    assert dialogues[4]['user'].tolist() == rows[4]['user'] and dialogues[4]['turns'] == rows[4]['turns']


def test_refused(tmp_path, small_data):
    def message(call):
        with pytest.raises(ValueError) as error:
            call()
        assert '\n' not in str(error.value)
        return str(error.value)
    assert 'no data folder' in message(lambda: Dialogues(str(tmp_path / 'nowhere'), 'train'))
    assert 'holds no train.arrow' in message(lambda: Dialogues(str(tmp_path), 'train'))
    (tmp_path / 'train.arrow').write_bytes(b'not arrow')
    assert 'not a file of dialogues' in message(lambda: Dialogues(str(tmp_path), 'train'))
    pa.ipc.new_file(str(tmp_path / 'train.arrow'), pa.schema([('a', pa.int8())])).close()
    assert 'not a file of dialogues' in message(lambda: Dialogues(str(tmp_path), 'train'))
    assert 'a chunk of duplex3 has 22 tokens, more than block_size 20' in message(lambda: make_loader(
        small_data, block_size=20))
    bad = dict(next(make_dialogues(1)), user=[40] * 10, assistant=[1] * 10, turns=[])
    import shutil
    shutil.copytree(small_data / 'tokenizer', tmp_path / 'tokenizer')
    save_dialogues(str(tmp_path / 'train.arrow'), [next(make_dialogues(1)), bad], CODEC)
    assert message(lambda: make_loader(tmp_path).measure()) == message(lambda: list(
        make_loader(tmp_path).epoch()))
    text = message(lambda: make_loader(tmp_path).measure())
    assert 'train.arrow: record 1' in text and 'user code 40 at frame 0 is out of range' in text


def test_a_mixture_holds_its_sets_by_weight(small_data, tmp_path):
    """Any stretch of rows, on any number of ranks, and again after its position came back. The second set's
    codes are told by its dialogues' ids, all k = 6 + 1."""
    shutil.copytree(small_data / 'tokenizer', tmp_path / 'tokenizer')
    save_dialogues(str(tmp_path / 'train.arrow'),
                   [dict(d, user=[7] * len(d['user'])) for d in make_dialogues(20)], CODEC)

    def mixture(**options):
        return Mixture([make_loader(small_data, **options), make_loader(tmp_path, **options)], [0.75, 0.25])

    def of_second(batch, vocab):
        heard = batch.idx.numpy() - vocab.code_start
        return [bool((row == 7).any()) for row in heard]

    whole = mixture(batch_size=8)
    vocab, batches = whole.loaders[0].vocab, [whole.next_batch() for _ in range(6)]
    picks = [pick for batch in batches for pick in of_second(batch, vocab)]
    for n in range(1, 49):
        assert abs(sum(picks[:n]) - n / 4) <= 1
    ranks = [mixture(batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    for batch in batches[:3]:
        halves = [rank.next_batch() for rank in ranks]
        assert torch.equal(torch.stack([half.idx for half in halves], 1).flatten(0, 1), batch.idx)
    again = mixture(batch_size=8)
    again.state = json.loads(json.dumps(ranks[0].state))
    assert torch.equal(again.next_batch().idx, batches[3].idx)
    assert len(list(whole.epoch())) == sum(len(list(loader.epoch())) for loader in whole.loaders)


def test_files_with_little_in_them(tmp_path, small_tokenizer):
    """No record at all (a test split of a tiny corpus), or records in which nobody says a thing."""
    shutil.copytree(small_tokenizer, tmp_path / 'tokenizer')
    save_dialogues(str(tmp_path / 'test.arrow'), [], CODEC)
    assert len(Dialogues(str(tmp_path), 'test')) == 0
    with pytest.raises(ValueError, match='nothing in test fits layout duplex3'):
        make_loader(tmp_path, split='test')
    save_dialogues(str(tmp_path / 'train.arrow'),
                   [dict(id='quiet', user=[1] * 30, assistant=[0] * 30, turns=[])] * 2, CODEC)
    assert Dialogues(str(tmp_path), 'train')[1]['turns'] == []
    assert (make_loader(tmp_path).next_batch().stream == STREAMS.index('silence')).all()


def test_without_padding(small_data):
    """The same documents, targets and streams in the same order, in one row as long as they are."""
    padded, bare = make_loader(small_data, batch_size=4), make_loader(small_data, batch_size=4, padded=False)
    for _ in range(3):
        a, b = padded.next_batch(), bare.next_batch()
        real = a.idx.numel() - sum(a.pos[row, a.doc[row] == a.doc[row, -1]].numel()
                                   for row in range(4)
                                   if not a.idx[row, a.doc[row] == a.doc[row, -1]].any())
        assert b.idx.shape == b.pos.shape == b.doc.shape == (1, real) and real < a.idx.numel()
        assert documents_of(a) == documents_of(b)
        assert torch.equal(a.targets, b.targets) and torch.equal(a.stream, b.stream) and a.sec == b.sec


def test_an_epoch_is_measured(small_data, monkeypatch):
    """Exact where all windows are read; in proportion where not."""
    monkeypatch.setattr(Loader, 'window', 8)        # 60 dialogues: 8 windows, the last of 4
    loader = make_loader(small_data)
    exact = loader.measure()
    assert exact['dialogues'] == 60 and exact['rows'] == sum(
        len(loader.read_window(0, window)) for window in range(8))
    guess = loader.measure(n_window=3)
    assert guess['dialogues'] == 60 and abs(guess['tokens'] / exact['tokens'] - 1) < 0.2


def test_a_thread_reads_ahead(small_data):
    """The same batches, whichever loader; the state is that of the batch in hand, though two more are made
    already."""
    def loader():
        return Mixture([make_loader(small_data), make_loader(small_data, ['asr'])], [1, 1])
    plain, ahead = loader(), Prefetch(loader(), 'cpu')
    assert ahead.state == plain.state
    for _ in range(30):
        a, b = plain.next_batch(), ahead.next_batch()
        assert all(
            torch.equal(x, y) for x, y in zip(a[:6], b[:6])) and a.sec == b.sec and ahead.state == plain.state
    state = json.loads(json.dumps(ahead.state))
    assert ahead.wait_sec > 0
    n_thread = threading.active_count()
    ahead.close()
    assert threading.active_count() == n_thread - 1
    resumed = loader()
    resumed.state = state
    again = Prefetch(resumed, 'cpu')
    assert all(torch.equal(x, y) for x, y in zip(plain.next_batch()[:6], again.next_batch()[:6]))
    again.close()


def test_what_the_loader_raises_the_reader_of_batches_sees(tmp_path, small_data):
    shutil.copytree(small_data / 'tokenizer', tmp_path / 'tokenizer')
    bad = dict(next(make_dialogues(1)), user=[40] * 10, assistant=[1] * 10, turns=[])
    save_dialogues(str(tmp_path / 'train.arrow'), [*make_dialogues(9), bad], CODEC)
    ahead = Prefetch(make_loader(tmp_path, batch_size=1), 'cpu')
    # at the batch that holds it, at the latest in the first epoch
    with pytest.raises(ValueError, match='record 9'):
        for _ in range(10):
            ahead.next_batch()
    ahead.close()


def test_a_dialogue_is_checked_once(small_data, tmp_path, monkeypatch):
    """In the first epoch, not in the next; one that is refused is refused whenever it is read."""
    seen = []
    monkeypatch.setattr('flatten.check',
                        lambda dialogue, *sizes: seen.append(dialogue['id']) or check(dialogue, *sizes))
    loader = make_loader(small_data, batch_size=1)
    for _ in range(3 * len(loader.rows)):
        loader.next_batch()
    assert loader.state['epoch'] >= 2 and len(seen) == len(set(seen)) == 60
    shutil.copytree(small_data / 'tokenizer', tmp_path / 'tokenizer')
    bad = dict(next(make_dialogues(1)), user=[40] * 10, assistant=[1] * 10, turns=[])
    save_dialogues(str(tmp_path / 'train.arrow'), [*make_dialogues(3), bad], CODEC)
    loader = make_loader(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match='record 3: .* user code 40 at frame 0'):
            loader.flatten(3, loader.layouts[0])


def test_a_rank_lays_its_own_rows_only(small_data, monkeypatch):
    """Two ranks' dialogues together are an epoch's, each laid once; a dialogue cut into many rows, too."""
    laid = []
    monkeypatch.setattr(loader_module, 'flatten',
                        lambda dialogue, *rest: laid.append(dialogue['id']) or flatten(dialogue, *rest))
    for rank in range(2):
        # 13 chunks, no dialogue is cut
        loader = make_loader(small_data, block_size=300, rank=rank, world_size=2, batch_size=1)
        n_row = len(loader.rows)
        for _ in range(n_row // 2):
            loader.next_batch()
    assert len(laid) == len(set(laid)) == sum(map(len, loader.rows[:n_row // 2 * 2]))
    laid.clear()
    loader = make_loader(small_data, block_size=64, batch_size=1)      # two chunks a row
    for _ in range(len(loader.rows)):
        loader.next_batch()
    assert len(laid) == len(set(laid)) == 60
