"""
Small whole files of every kind that is read here, and what reads them: the material of fuzz.py.

    READERS = {'manifest': Reader(write, ['*.jsonl', '*.wav'], read)}
        write(folder)       writes the small files
        victims             which of them are damaged
        read(folder, out)   -> how many were accepted, how many skipped; raises ValueError or SystemExit for
                            what is refused. out: what a prepare.py is to write
"""
import gzip
import io
import json
import os
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import soundfile

from codec import load_codec
from common.audio import read_audio
from common.files import read_json, read_jsonl
from common.record import check
from data import recordings, simulate
from data.behavior_sd import prepare as behavior_sd
from data.codes import prepare as codes
from data.dialogues import Dialogues, save_dialogues
from data.ldc import prepare as ldc
from data.lhotse import prepare as lhotse_cuts
from data.loader import Loader
from data.made_up import hum, make_codec, make_vocabulary
from data.manifest import prepare as manifest
from data.moshi_finetune import prepare as moshi_finetune
from data.otospeech import prepare as otospeech
from data.seamless import prepare as seamless
from data.webdataset import prepare as webdataset
from flatten import get_layout
from inputs import read_input
from measures import foreign, judge
from vocabulary import Vocabulary

CODEC = Path('/nowhere')        # fuzz.py puts the folder of a small codec here
TOY = dict(name='toy', rate_hz=25.0, n_codes=32, sample_rate=16000, fingerprint='0' * 16)


class Reader(NamedTuple):
    write: Callable
    victims: list           # patterns below the folder
    read: Callable
    share: float = 1.0      # of the inputs that others get


def write_codec(folder):
    make_codec().save(folder)


# ------------------------------------------------------------------------------------------------------------
# small files

def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')


def put_rows(path, rows):
    put(path, ''.join(json.dumps(row) + '\n' for row in rows))


def put_wave(path, *pitches, n_sec=1.0, rate=16000, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([hum(pitch, n_sec, rate) for pitch in pitches], 1), rate, **how)


def pack(folder, name=None):
    """folder/… -> folder.tar, in its place"""
    path = folder.parent / (name or f'{folder.name}.tar')
    with (gzip.open if path.suffix == '.gz' else open)(path, 'wb') as file, \
            tarfile.open(fileobj=file, mode='w') as tar:
        for each in sorted(folder.iterdir()):
            tar.add(each, each.name)
            each.unlink()
    folder.rmdir()


def dialogue(i, n_frame=40):
    words = [dict(text='hello', start=4, end=8), dict(text='thére', start=9, end=14)]
    return dict(id=f'd{i}', user=np.arange(n_frame) % 32, assistant=np.arange(n_frame)[::-1] % 32, turns=[
        dict(role='user', start=3, end=15, text='hello thére', words=words),
        dict(role='assistant', start=16, end=30, text='good-bye <|eot|>',
             words=[])], prompt='You are a waiter.' * (i % 2))


def write_arrow(folder, splits=('train', 'val')):
    for split in splits:
        save_dialogues(str(folder / f'{split}.arrow'), [dialogue(i) for i in range(12)], TOY)


def write_sounds(folder):
    for name, how in dict(a=dict(suffix='wav'), b=dict(suffix='flac'), c=dict(suffix='mp3'),
                          d=dict(suffix='ogg'),
                          e=dict(suffix='wav',
                                 subtype='FLOAT'), f=dict(suffix='aiff'), g=dict(suffix='w64')).items():
        suffix = how.pop('suffix')
        put_wave(folder / f'{name}.{suffix}', 140, n_sec=0.4, **how)


TEXTGRID = '''File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1
tiers? <exists>
size = 1
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1
        intervals: size = 2
        intervals [1]:
            xmin = 0.1
            xmax = 0.5
            text = "hello"
        intervals [2]:
            xmin = 0.5
            xmax = 0.9
            text = "there"
'''


def write_manifest(folder):
    for name in 'abc':
        put_wave(folder / f'{name}.wav', 140)
    put(folder / 'b.TextGrid', TEXTGRID)
    put(folder / 'c.ctm', 'c 1 0.1 0.4 hello 0.9\nc 1 0.5 0.4 there 0.8\n')
    put_rows(folder / 'rows.jsonl', [dict(id=name, audio=f'{name}.wav', text='hello there', duration=1.0)
                                     for name in 'abc'])


def write_moshi(folder):
    for name in 'ab':
        put_wave(folder / f'{name}.wav', 140, 220)
        put(folder / f'{name}.json', dict(alignments=[['Hello', [0.1, 0.4], 'SPEAKER_MAIN'],
                                                      ['you', [0.5, 0.9], 'USER']]))
    put_rows(folder / 'rows.jsonl', [dict(path=f'{name}.wav', duration=1.0) for name in 'ab'])


def write_codes(folder):
    put_wave(folder / 'u.wav', 140)
    put_rows(folder / 'rows.jsonl', [
        dict(split_name='s', index=1, round=1, source_text='<USER>: hi', source_wav='u.wav',
             target_text='yes', target_token=[1, 2, 3] * 8),
        dict(split_name='s', index=1, round=2, source_text='<USER>: so', source_wav='u.wav', target_text='no',
             target_token='4 5 6 7'),
        dict(split_name='s', index=2, round=1, source_text='', target_text='well', target_token=[[7, 8, 9]])])


def write_cuts(folder):
    put_wave(folder / 'u.wav', 140)
    put_wave(folder / 'a.wav', 220)
    cuts = []
    for id in 'xy':
        user, agent = (dict(id=name, sources=[dict(type='file', channels=[0], source=f'{name}.wav')],
                            sampling_rate=16000,
                            num_samples=16000, duration=1.0, channel_ids=[0]) for name in 'ua')
        said = [dict(id=f'{id}{n}', recording_id='u', start=0.1 + 0.4 * n, duration=0.3, channel=0,
                     speaker=('user', 'agent')[n],
                     text='hello there', alignment=dict(word=[['hello', 0.1 + 0.4 * n, 0.2,
                                                               0.9]])) for n in range(2)]
        cuts.append(dict(id=id, start=0, duration=1.0, channel=0, recording=user, supervisions=said,
                         custom=dict(target_audio=agent), type='MonoCut'))
    put_rows(folder / 'cuts.jsonl', cuts)
    with gzip.open(folder / 'cuts.jsonl.gz', 'wt') as file:
        file.writelines(json.dumps(cut) + '\n' for cut in cuts)
    (folder / 'cuts.jsonl').unlink()


def write_shar(folder):
    write_cuts(folder)
    with gzip.open(folder / 'cuts.jsonl.gz', 'rt') as file:
        cuts = [json.loads(line) for line in file]
    with gzip.open(folder / 'cuts.000000.jsonl.gz', 'wt') as file:
        file.writelines(json.dumps(cut) + '\n' for cut in cuts)
    for field, name in dict(recording='u', target_audio='a').items():
        inside = folder / 'inside'
        for cut in cuts:
            put(inside / f'{cut["id"]}.json', cut['recording'] | dict(id=name))
            (inside / f'{cut["id"]}.flac').write_bytes(sound('FLAC', 140))
        pack(inside, f'{field}.000000.tar')
    for name in ('cuts.jsonl.gz', 'u.wav', 'a.wav'):
        (folder / name).unlink()


def sound(form, *pitches):
    file = io.BytesIO()
    soundfile.write(file, np.stack([hum(pitch, 1.0) for pitch in pitches], 1), 16000, format=form)
    return file.getvalue()


def write_shards(folder, name='shard.tar'):
    inside = folder / 'shard'
    for n, form in enumerate(('FLAC', 'WAV', 'MP3')):
        put(inside / f'x{n}.json', dict(text='hello there',
                                        alignments=[['hello', [0.1, 0.4], 'SPEAKER_MAIN']]))
        (inside / f'x{n}.{form.lower()}').write_bytes(sound(form, 140))
    put(inside / 'x3.txt', 'good-bye')
    (inside / 'x3.flac').write_bytes(sound('FLAC', 140))
    pack(inside, name)


def write_behavior(folder):
    inside = folder / 'train/0001'
    for n in (7, 8):
        put(inside / f'{n}.json', dict(utterances=[
            dict(speaker_idx=0, tts_text='So we go.', start_time=0.1, end_time=0.5,
                 backchannels=[dict(tts_text='Yeah.', start_time=0.2, end_time=0.3)]),
            dict(speaker_idx=1, tts_text='Yes.', start_time=0.6, end_time=0.9)]))
        (inside / f'{n}.flac').write_bytes(sound('FLAC', 140, 220))
    pack(inside)


def write_seamless(folder):
    for n in (1, 2):
        inside = folder / f'000{n}'
        put_wave(inside / f'V00_S01_I02_P{n}.wav', 140)
        put(inside / f'V00_S01_I02_P{n}.json', {'metadata:transcript': [dict(
            transcript='Nice one.', start=0.1, end=0.8, words=[dict(word='Nice', start=0.1, end=0.4),
                                                               dict(word='one.')])]})
    pack(folder / '0002')


def write_oto(folder):
    inside = folder / 'oto/shard'
    for name in 'st':
        put(inside / f'{name}.json', dict(speakers=[dict(speaker_id='ann', channel=1),
                                                    dict(speaker_id='bob', channel=0)]))
        (inside / f'{name}.flac').write_bytes(sound('FLAC', 140, 220))
    pack(inside)
    put(folder / 'seglst.json', [dict(session_id=id, speaker=name, start_time=0.1, end_time=0.8,
                                      words='Oh hi.',
                                      word_alignment=[['Oh', 0.1, 0.3], ['hi.', 0.3, 0.8]]) for id in 'st'
                                 for name in ('ann', 'bob')])


def write_oto_turns(folder):
    for n in (1, 2):
        put_wave(folder / f'42/speaker_{n}_audio.wav', 140)
        put(folder / f'42/speaker_{n}_annotation_a.srt',
            '1\n00:00:00,200 --> 00:00:00,800\n[Normal Turn] Hey man,\nhow is it going?\n\n'
            '2\n00:00:00,900 --> 00:00:00,950\n[Laughter]\n')


def write_calls(folder):
    put_wave(folder / 'fe_03_00001.sph', 140, 220, rate=8000, format='NIST', subtype='ULAW')
    put_wave(folder / 'sw02001.sph', 140, 220, rate=8000, format='NIST', subtype='PCM_16')
    put(folder / 'fe_03_00001.txt', '# fe_03_00001.sph\n\n0.20 0.60 A: hi (( um ))\n0.70 0.90 B: an- hello\n')
    for side in 'AB':
        put(folder / f'sw2001{side}-ms98-a-word.text',
            f'sw2001{side}-ms98-a-0001 0.1 0.4 hi\nsw2001{side}-ms98-a-0001 0.5 0.9 [laughter-so]\n')


def write_texts(folder):
    put(folder / 'alpaca.json', [dict(instruction='Say hello.', input='', output='Hello there.')] * 2)
    put_rows(folder / 'sharegpt.jsonl', [{'conversations': [{'from': 'human', 'value': 'Who are you?'},
                                                            {'from': 'gpt', 'value': 'A model.'}]}])
    hi = dict(role='user', content=[dict(type='text', text='Hi')])
    put_rows(folder / 'openai.jsonl', [dict(messages=[hi, dict(role='assistant', content='Yes.')])])
    put(folder / 'lccc.json', dict(valid=[['你 好', '好 的']]))
    put_rows(folder / 'ultra.jsonl', [dict(id='0', data=['Hello?', 'Hi.'])])
    put_rows(folder / 'belle.jsonl', [dict(question='你好', std_answer='好'),
                                      dict(instruction='Human: 你好\nAssistant:', output='好', input='')])
    put(folder / 'moss.json', dict(chat=dict(turn_1=dict(Human='<|Human|>: Hi <eoh>', Commands='None',
                                                         MOSS='<|MOSS|>: Hello. <eom>'))))
    put_rows(folder / 'oasst.jsonl', [dict(prompt=dict(role='prompter', text='Well?', lang='en', replies=[
        dict(role='assistant', text='Yes.', rank=0, replies=[]), dict(role='assistant', text='No.',
                                                                      rank=1)]))])


def write_foreign(folder):
    for name in 'abcde':
        put_wave(folder / f'{name}.wav', 140, 220)
    put_rows(folder / 'a.jsonl', [dict(role='user', start_sec=0.1, end_sec=0.4, text='Hello.'),
                                  dict(role='assistant', start_sec=0.5, end_sec=0.9, text='Hi.')])
    put(folder / 'b.tsv', 'role\tstart\tend\tword\nuser\t0.1\t0.4\tHello\nassistant\t0.5\t0.9\tHi\n')
    put(folder / 'c.csv', 'user,0.1,0.4,"Hello, you"\nassistant,0.5,0.9,Hi\n')
    put(folder / 'd.json', dict(alignments=[['Hello', [0.1, 0.4], 'user'], ['Hi', [0.5, 0.9], 'assistant']]))
    put(folder / 'e.txt', 'user 0.1 0.4 Hello\nassistant 0.5 0.9 Hi\n')


def write_samples(folder):
    inside = folder / 'smooth/1'
    for name in ('input', 'output'):
        put_wave(inside / f'{name}.wav', 140)
    put(inside / 'transcription.json', [dict(text='Hello', timestamp=[0.1, 0.4])])
    put(inside / 'output.json', dict(text='Hi', chunks=[dict(text='Hi', timestamp=[0.5, 0.9])]))


def write_rows_of_input(folder):
    put_wave(folder / 'q.wav', 140)
    put_rows(folder / 'in.jsonl', [dict(id='one', audio=str(folder / 'q.wav'), instruction='Sum it up.'),
                                   dict(audio=str(folder / 'q.wav'))])


def write_judged(folder):
    put_rows(folder / 'talk.jsonl', [dict(role='user', start_sec=0.1, end_sec=0.4, text='Hello?'),
                                     dict(role='assistant', start_sec=0.5, end_sec=1, text='Hi.')])
    put_rows(folder / 'cache.jsonl', [dict(key='0' * 64, model='m', score=8, why='good')])
    put(folder / 'answer.json', dict(choices=[dict(message=dict(content='{"score": 8, "why": "good"}'))],
                                     usage=dict(prompt_tokens=1, completion_tokens=2)))


def write_prepared(folder):
    write_manifest(folder)
    (folder / 'c.wav').write_bytes(b'RIFF')
    prepare_again(folder)
    put_wave(folder / 'c.wav', 140)


# ------------------------------------------------------------------------------------------------------------
# what reads them

def prepare(module, folder, out, *arguments):
    """Runs a prepare.py -> (records, skipped). What it wrote has to be whole."""
    before, sys.argv = sys.argv, ['prepare.py', f'--out={out}', f'--codec={CODEC}', '--n_thread=1',
                                  '--val_share=0.4', '--test_share=0.3',
                                  *(str(folder / name) if not name.startswith('--') else name
                                    for name in arguments)]
    try:
        module.main()
    finally:
        sys.argv = before
    n = 0
    for split in ('train', 'val', 'test'):
        dialogues = Dialogues(str(out), split, with_words=True)
        for i in range(len(dialogues)):
            check(dialogues[i], dialogues.codec['n_codes'])
        n += len(dialogues)
    with open(out / 'skipped.jsonl', encoding='utf-8') as file:
        return n, len(file.readlines())


def prepare_again(folder, out=None):
    os.chdir(folder)        # a finished folder knows the path of its manifest
    return prepare(manifest, Path(''), Path('done'), 'rows.jsonl')


def by_prepare(module, *arguments):
    return lambda folder, out: prepare(module, folder, out, *(name.replace('{}', str(folder))
                                                              for name in arguments))


def read_arrow(folder, out):
    dialogues = Dialogues(str(folder), 'train', with_words=True)
    for i in range(len(dialogues)):
        row = dialogues[i]
        check(row, dialogues.codec['n_codes'])
        assert same(row, dialogue(i)), 'unnoticed: another record than was written'
    assert len(dialogues) == 12 and dialogues.codec == TOY, 'unnoticed: another file than was written'
    loader = Loader(Dialogues(str(folder), 'train'), [get_layout('duplex3')], make_vocabulary(300, 32), 256,
                    2)
    loader.measure(), loader.next_batch()
    return len(dialogues), 0


def same(row, other):
    turns = [dict(turn, words=turn.get('words', [])) for turn in row['turns']]
    channels = all(np.array_equal(row[role], other[role]) for role in ('user', 'assistant'))
    said = [row['id'], row.get('prompt', ''), turns]
    return channels and said == [other['id'], other['prompt'], other['turns']]


def each(paths, read):
    """How many files can be read, how many are refused in a sentence; refused as a whole if none can."""
    n, reasons = 0, []
    for path in sorted(paths):
        try:
            read(path)
            n += 1
        except ValueError as error:
            reasons.append(error)
    if not n:
        raise reasons[0]
    return n, len(reasons)


def read_sounds(folder, out):
    def read(path):
        wave = read_audio(str(path), 16000, 0)
        assert np.isfinite(wave).all() and len(wave) < 16000 * 3600
        assert recordings.read_piece(str(path), path.name, 16000).shape[1] < 16000 * 3600
    return each(folder.iterdir(), read)


def read_texts(folder, out):
    def read(path):
        simulate.collect([str(path)], SimpleNamespace(max_words=200, max_symbols=0.05))
    return each(folder.iterdir(), read)


def read_foreign(folder, out):
    return each([folder], lambda path: list(foreign.read_conversations(str(path), vad='energy')))


def read_inputs(folder, out):
    cfg = SimpleNamespace(user=None, input=str(folder / 'in.jsonl'), reply_sec=0.1, user_channel=None,
                          prompt=None, instruction=None)
    return len(read_input(cfg, load_codec(CODEC), get_layout('duplex3'))), 0


def read_judged(folder, out):
    def read(path):
        if path.name == 'cache.jsonl':
            judge.open_cache(str(path))[1].close()
        elif path.name == 'talk.jsonl':
            judge.to_items([judge.read_transcript(str(path))])
        else:
            asker = judge.Asker('http://nowhere', 'm', 'key', 1, 1, 0)
            judge.post = lambda *_: (200, {}, path.read_bytes())
            answer = asker.ask('?')
            if answer['score'] is None:
                raise ValueError(answer['error'])
    return each(folder.iterdir(), read)


def read_codec(folder, out):
    codec = load_codec(folder)
    assert codec.describe() == load_codec(CODEC).describe(), 'unnoticed: another codec than was written'
    return 1, 0


def read_tokenizer(folder, out):
    vocab = Vocabulary.load(folder, 32)
    vocab.decode(vocab.encode('hello <|eot|>'))
    return 1, 0


def read_files(folder, out):
    return each(folder.iterdir(), lambda path: read_json(path) if path.suffix == '.json'
                else list(read_jsonl(path)))


READERS = {
    'arrow': Reader(write_arrow, ['train.arrow'], read_arrow, 4),
    'sounds': Reader(write_sounds, ['*'], read_sounds, 4),
    'json': Reader(write_foreign, ['*.json', '*.jsonl'], read_files),
    'codec': Reader(write_codec, ['*'], read_codec),
    'tokenizer': Reader(lambda folder: make_vocabulary(300, 32).save(folder),
                        ['tokenizer.json', '*config.json'], read_tokenizer, 0.5),
    'texts': Reader(write_texts, ['*'], read_texts, 2),
    'foreign': Reader(write_foreign, ['*'], read_foreign),
    'samples': Reader(write_samples, ['smooth/1/*'], read_foreign),
    'input': Reader(write_rows_of_input, ['*'], read_inputs),
    'judge': Reader(write_judged, ['*'], read_judged),
    'manifest': Reader(write_manifest, ['*'], by_prepare(manifest, 'rows.jsonl')),
    'moshi_finetune': Reader(write_moshi, ['*'], by_prepare(moshi_finetune, 'rows.jsonl')),
    'codes': Reader(write_codes, ['*'], by_prepare(codes, 'rows.jsonl')),
    'lhotse': Reader(write_cuts, ['*'], by_prepare(lhotse_cuts, 'cuts.jsonl.gz')),
    'lhotse_shar': Reader(write_shar, ['*'], by_prepare(lhotse_cuts, '')),
    'webdataset': Reader(write_shards, ['*'], by_prepare(webdataset, 'shard.tar')),
    'webdataset_gz': Reader(lambda folder: write_shards(folder, 'shard.tar.gz'), ['*'],
                            by_prepare(webdataset, 'shard.tar.gz')),
    'behavior_sd': Reader(write_behavior, ['train/*'], by_prepare(behavior_sd, '')),
    'seamless': Reader(write_seamless, ['*', '0001/*'], by_prepare(seamless, '')),
    'otospeech': Reader(write_oto, ['oto/*', 'seglst.json'],
                        by_prepare(otospeech, 'oto', '--labels={}/seglst.json')),
    'otospeech_turns': Reader(write_oto_turns, ['42/*'], by_prepare(otospeech, '')),
    'ldc': Reader(write_calls, ['*'], by_prepare(ldc, '')),
    'prepared': Reader(write_prepared, ['done/*.arrow', 'done/*.json*'], prepare_again),
}
