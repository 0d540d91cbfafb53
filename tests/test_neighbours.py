"""The neighbours' layouts from end to end: trained on prepared data, saved, loaded, sampled."""
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from conftest import make_dialogues
from test_rvq import codecs, folders  # noqa: F401

import config
import sample
import train
from checkpoint import load_checkpoint
from codec import load_codec
from common.audio import write_audio
from data.dialogues import Dialogues, save_dialogues
from data.loader import Loader
from data.made_up import hum
from flatten import flatten, get_layout
from measures.replies import stops
from vocabulary import Vocabulary

TINY = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_inner=64, block_size=768, batch_size=2,
            batch_tokens=1536, eval_interval=4, n_listen=1, device='cpu', tensorboard=False)


def with_words(dialogues):
    """Each word of a turn gets its share of the turn's frames."""
    for d in dialogues:
        for turn in d['turns']:
            texts = turn['text'].split()
            at = np.linspace(turn['start'], turn['end'], len(texts) + 1).astype(int).tolist()
            turn['words'] = [dict(text=text, start=a, end=b) for text, a, b in zip(texts, at, at[1:])]
        yield d


@pytest.fixture(scope='module')
def data(tmp_path_factory, small_tokenizer, small_codec):
    """A data folder with word times, as a prepare.py leaves it."""
    folder = tmp_path_factory.mktemp('words')
    shutil.copytree(small_tokenizer, folder / 'tokenizer')
    small_codec.save(folder / 'codec')
    for split, n in (('train', 20), ('val', 4), ('test', 4)):
        save_dialogues(str(folder / f'{split}.arrow'), with_words(make_dialogues(n, seed=len(split))),
                       small_codec.describe())
    return folder


@pytest.mark.parametrize('stages', [
    'blsp+salm+usdm_pretrain:2, usdm_sft:2', 'glm4voice:4', 'outetts.assistant:4', 'mini_omni2_irq:4',
    'syncllm:4', 'nemo_duplex:4'])
def test_trained_saved_and_sampled(data, tmp_path, stages, capsys):
    """One checkpoint after the other by the last of its stages, with the control tokens of all of them."""
    out = str(tmp_path / 'run')
    train.main(train.Config(data=str(data), out_dir=out, stages=stages, **TINY))
    checkpoint = load_checkpoint(out)
    names = [part.split(':')[0].strip() for part in stages.replace('+', ',').split(',')]
    assert [layout.name for layout in checkpoint.info.layouts] == names
    for layout in checkpoint.info.layouts:
        assert all(name in checkpoint.vocab.control for name in layout.control)
    dialogues = sample.main(sample.Config(checkpoint=out, data=str(data), n_dialogue=2, max_new_tokens=20,
                                          out=str(tmp_path / 'samples')))
    assert dialogues and len(list((tmp_path / 'samples').glob('*.wav'))) == len(dialogues)
    printed = capsys.readouterr().out
    assert 'documents in' in printed or 'look and listen' in printed


@pytest.mark.parametrize('layout', ['glm4voice', 'outetts', 'usdm_pretrain', 'syncllm', 'nemo_duplex'])
def test_rows_are_shown(data, tmp_path, layout, capsys):
    """train.py --show=1 recognises its documents, and finds no target wrong."""
    train.main(train.Config(data=str(data), out_dir=str(tmp_path), stages=f'{layout}:2', show=1, **TINY))
    shown = capsys.readouterr().out
    assert f', {layout}' in shown and '!' not in shown.split('is not the next token')[1]


@pytest.mark.slow
@pytest.mark.parametrize('kind, stages', [('snac', 'duplex3:2, mini_omni:2'), ('mimi', 'duplex2:2, moshi:2'),
                                          ('dac', 'outetts3.assistant:2'), ('mimi', 'nemo_duplex:2')])
def test_several_codes_a_frame(kind, stages, codecs, small_tokenizer, tmp_path):  # noqa: F811
    """From waves through codecs of several codebooks to waves: trained, saved, sampled, measured."""
    codec, rng = codecs[kind], np.random.default_rng(0)
    n_code, folder = codecs[kind].n_codes // codecs[kind].codebook_size, tmp_path / 'data'
    shutil.copytree(small_tokenizer, folder / 'tokenizer')
    codec.save(folder / 'codec')
    first = np.arange(n_code) * codec.codebook_size

    def records(n):
        for d in with_words(make_dialogues(n, n_frame=(40, 60))):
            for role in ('user', 'assistant'):
                d[role] = rng.integers(0, codec.codebook_size, (len(d[role]), n_code)) + first
            yield d
    for split in ('train', 'val', 'test'):
        save_dialogues(str(folder / f'{split}.arrow'), records(4), codec.describe())
    out, samples = str(tmp_path / 'run'), tmp_path / 'samples'
    sizes = TINY | dict(block_size=1536, batch_tokens=3072)
    train.main(train.Config(data=str(folder), out_dir=out, stages=stages, **sizes))
    dialogues = sample.main(sample.Config(checkpoint=out, data=str(folder), n_dialogue=1, max_new_tokens=60,
                                          out=str(samples)))
    for d in dialogues:
        for role in ('user', 'assistant'):
            codes = np.asarray(d[role]).reshape(-1, n_code)
            assert ((codes >= first) & (codes < first + codec.codebook_size)).all()
        wave, rate = soundfile.read(samples / f'{d["id"]}.wav')
        n_frame = max(len(d['user']), len(d['assistant']))
        assert rate == 24000 and len(wave) == n_frame * round(24000 / codec.rate_hz)
    if 'outetts' not in stages:
        first_user = next(iter(Dialogues(str(folder), 'test')))['user']
        assert np.array_equal(np.asarray(dialogues[0]['user'])[:5], first_user[:5])


def test_a_checkpoint_learns_new_control_tokens(small_run, data, tmp_path, capsys):
    """A duplex checkpoint goes on with a layout whose tokens it did not have; what it knew stays in place."""
    old = load_checkpoint(str(small_run[1]))
    out = str(tmp_path / 'run')
    train.main(train.Config(data=str(data), out_dir=out, stages='mini_omni2_irq:2', learning_rate=0.0,
                            init_from=str(small_run[1]), weight_decay=0.0, **TINY))
    assert 'ids are new' in capsys.readouterr().out
    new = load_checkpoint(out)
    assert {name: new.vocab.control[name] for name in old.vocab.control} == old.vocab.control
    assert new.vocab.code_start == old.vocab.code_start and '<|irq|>' in new.vocab.control
    known = [i for i in range(old.vocab.code_start + old.vocab.n_codes)]
    rows = [each.model.model.embed_tokens.weight[known] for each in (old, new)]
    assert (rows[0] == rows[1]).all()
    assert [layout.name for layout in new.info.layouts] == ['duplex3', 'mini_omni2_irq']


def test_each_epoch_draws_anew(data):
    """The same run repeats its draws; another epoch and another seed have others."""
    vocab = Vocabulary.load(data / 'tokenizer', 32, get_layout('usdm_pretrain').control)

    def ids(epoch, seed=0):
        layout = get_layout('usdm_pretrain', speech_chunk=10)
        loader = Loader(Dialogues(str(data), 'train'), [layout], vocab, 512, 1, seed)
        rows = loader.read_window(epoch, 0, shuffle=False)
        return sorted(lay().ids.tolist() for row in rows for lay, *_ in row)
    assert ids(0) == ids(0) and ids(0) != ids(1) and ids(0) != ids(0, seed=1)
    # whatever is written of a turn, it lasts as long as the turn
    loader = Loader(Dialogues(str(data), 'train'), [get_layout('usdm_pretrain', speech_chunk=10)], vocab,
                    512, 1)
    turns = [turn for i in range(20) for turn in loader.dialogues[i]['turns']]
    assert loader.counts['sec'] == pytest.approx(sum(turn['end'] - turn['start'] for turn in turns) / 25)


def test_long_ragged_dialogues_are_cut_at_chunks(data, small_codec):
    vocab = Vocabulary.load(data / 'tokenizer', 32, get_layout('syncllm').control)
    layout, dialogues = get_layout('syncllm').bind(small_codec.describe()), Dialogues(str(data), 'train')
    loader = Loader(dialogues, [layout], vocab, 40, 1)
    for i in range(5):
        document, = flatten(dialogues[i], layout, vocab)
        (parts,) = loader.take(i, layout, 0)
        assert len(parts) > 1 and [part.at for part in parts][0] == 0
        assert all(part.at in document.cuts and part.n <= 41 for part in parts)
        assert sum(part.n for part in parts) == len(document.ids)
        assert sum(part.sec for part in parts) == pytest.approx(len(dialogues[i]['user']) / 25)
        ends = [part.at + part.n for part in parts]
        assert ends == [part.at for part in parts[1:]] + [len(document.ids)]


def test_jsonl_in_and_out(data, tmp_path):
    """As BLSP's generate.py has it: each row comes back with the answer, its own instruction wins."""
    out = str(tmp_path / 'run')
    train.main(train.Config(data=str(data), out_dir=out, stages='blsp:2', **TINY))
    codec = load_codec(str(data))
    for name in 'ab':
        write_audio(str(tmp_path / f'{name}.wav'), hum(150, 0.4, codec.sample_rate), codec.sample_rate)
    rows = [dict(audio=str(tmp_path / 'a.wav'), id='first', reference='kept'),
            dict(audio=str(tmp_path / 'b.wav'), instruction='In one word.')]
    (tmp_path / 'in.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
    cfg = sample.Config(checkpoint=out, input=str(tmp_path / 'in.jsonl'),
                        output=str(tmp_path / 'out.jsonl'), instruction='Sum it up.',
                        out=str(tmp_path / 'samples'), max_new_tokens=9)
    dialogues = sample.main(cfg)
    got = [json.loads(line) for line in open(tmp_path / 'out.jsonl')]
    assert [row['id'] for row in got] == ['first', 'in-2'] and got[0]['reference'] == 'kept'
    assert [row['response'] for row in got] == [
        next(t['text'] for t in d['turns'] if t['role'] == 'assistant') for d in dialogues]
    assert [d['prompt'] for d in dialogues] == ['Sum it up.', 'In one word.']
    (tmp_path / 'in.jsonl').write_text('{"id": "x"}\n')
    with pytest.raises(ValueError, match='in.jsonl:1: a row needs "audio", a file, or "text"'):
        sample.main(cfg)
    (tmp_path / 'in.jsonl').write_text('\n{"audio": "nowhere.wav"}\n')
    with pytest.raises(ValueError, match='in.jsonl:2: .*nowhere.wav'):
        sample.main(cfg)
    (tmp_path / 'in.jsonl').write_text('{"text": "read this"}\n')
    with pytest.raises(ValueError, match='in-1: layout blsp needs "audio" in rows of --input'):
        sample.main(cfg)
    (tmp_path / 'in.jsonl').write_text('{"text": "a", "id": 1}\n{"text": "b", "id": 1}\n')
    with pytest.raises(ValueError, match="in.jsonl:2: an earlier row has the id '1', too"):
        sample.main(cfg)
    with pytest.raises(ValueError, match='output and instruction go with input'):
        replace(cfg, input=None, data=str(data))


def test_text_is_read_aloud(data, tmp_path):
    """Rows of text, for a layout that speaks."""
    out = str(tmp_path / 'run')
    train.main(train.Config(data=str(data), out_dir=out, stages='tts:2', **TINY))
    (tmp_path / 'in.jsonl').write_text('{"text": "yes ok"}\n')
    dialogue, = sample.main(config.load(sample.Config, [
        f'--checkpoint={out}', f'--input={tmp_path}/in.jsonl', f'--out={tmp_path}/samples',
        '--max_new_tokens=9']))
    (turn,) = dialogue['turns']
    assert turn['role'] == 'assistant' and turn['text'] == 'yes ok' and 0 <= turn['end'] <= 10
    write_audio(str(tmp_path / 'a.wav'), hum(150, 0.4), 16000)
    with pytest.raises(ValueError, match='a: layout tts needs "text" in rows of --input'):
        sample.main(sample.Config(checkpoint=out, user=str(tmp_path / 'a.wav'), out=str(tmp_path / 'out')))


def test_interruptions_are_counted():
    """Two of the reference, at frames 10 and 40. The model says the first 3 frames late, misses the second,
    and says one where nobody interrupts. 60 frames at 20 Hz are 3 s: 20 false ones a minute."""
    def said(*stops):
        turns = []
        for start, end in stops:
            turns += [dict(role='assistant', start=start, end=end, text=''),
                      dict(role='user', start=end - 1, end=end, text='')]
        return dict(user=[0] * 60, turns=[*turns, dict(role='assistant', start=55, end=60, text='')])
    figures = stops([said((0, 13), (20, 35))], [said((0, 10), (20, 40))], 20.0, 2)
    assert figures == dict(n_stop=2, stop_found_rate=0.5, stop_ms=150.0, false_stop_per_min=20.0)
    nothing = stops([said()], [said()], 20.0, 2)
    assert nothing == dict(n_stop=0, false_stop_per_min=0.0)


def test_playing_stops_at_irq():
    from clock import play_until_stopped
    decoded = dict(turns=[dict(role='assistant', start=0, end=9, text=''), dict(role='user', start=8, end=9)])
    said = [dict(role='assistant', start=start, end=end, text='') for start, end in ((2, 7), (8, 30))]
    assert [t['end'] for t in play_until_stopped(decoded, [], said)['turns']] == [7, 9]


def test_a_codec_that_does_not_fit(data, tmp_path):
    with pytest.raises(ValueError, match='layout mini_omni has 7 codes a frame, the codec mel has 1'):
        train.main(train.Config(data=str(data), out_dir=str(tmp_path / 'run'), stages='mini_omni:2', **TINY))
