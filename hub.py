"""
Folders that can be uploaded to the Hugging Face Hub: a checkpoint with its card, a data set that the Hub's
viewer opens. Nothing is sent anywhere: huggingface_hub's `hf upload` does that.

    python hub.py --checkpoint=out/demo --out=out/hub/demo --license=mit --language=en
        model, tokenizer and codec, without the states of the run; evaluation/metrics.json, where evaluate.py
        measured these weights; README.md (card.py)
    python hub.py --data=data/demo --out=out/hub/demo-data --license=mit --language=en --n_heard=20
        parquet files of all splits, 20 dialogues of each as sound; codec, tokenizer; README.md
    python hub.py --data=out/hub/demo-data --out=data/again
        such a folder, downloaded: Arrow files again, of the same records, to train on
"""
import io
import json
import os
import shutil
import sys
from dataclasses import dataclass
from glob import escape, glob

import pyarrow as pa
import pyarrow.parquet as pq

import card
import config
from checkpoint import check, public_manifest, read_info
from codec import load_codec
from common.files import whole, write_json
from common.manifest import NAME
from data.dialogues import Dialogues, open_table, save_table
from decode import render

SPLITS = {'train': 'train', 'val': 'validation', 'test': 'test'}        # ours: the Hub's
ROWS = 1000         # of a row group, of which the viewer reads one at a time
AUDIO = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
DATA_CARD = """# {name}

Dialogues of two channels as codes of a speech codec, for nanoduplex. {counts}

- `user`, `assistant`: a code a frame, {rate_hz:g} frames a second, of codec {codec} (fingerprint
  {fingerprint}), which lies in `codec/`. Codes of a codec of several codebooks lie frame after frame.
- `turns`: who says what, from which frame to which; `words`, where their times are known.
- `prompt`: what the assistant was told before, if anything.
{heard}
In a clone of nanoduplex, to train on them:

```bash
python hub.py --data=FOLDER --out=data/{name}
python train.py config/demo.py --data=data/{name}
```

## Licence

{license}. The code of nanoduplex is under MIT.
"""


@dataclass(frozen=True)
class Config:
    checkpoint: str | None = None       # a folder that train.py wrote
    data: str | None = None             # or a data folder
    out: str = ''                       # a new folder
    license: str | None = None          # an identifier of the Hub: mit, apache-2.0, cc-by-4.0, other, …
    language: str | None = None         # its codes: 'en', or several, 'en,zh'
    base_model: str | None = None       # of a checkpoint, its name on the Hub: 'Qwen/Qwen2-0.5B'
    datasets: str | None = None         # … those it was trained on, by their names there: 'me/a,me/b'
    n_heard: int = 0                    # of data: dialogues of each split that are there as sound, too

    def __post_init__(self):
        if (self.checkpoint is None) == (self.data is None):
            raise ValueError('give --checkpoint=FOLDER or --data=FOLDER: one of them')
        if not self.out:
            raise ValueError('give --out=FOLDER: where it is written')
        if self.n_heard < 0:
            raise ValueError(f'n_heard is {self.n_heard}, it cannot be negative')


def names(text):
    """'en, zh' -> ['en', 'zh']"""
    return [part.strip() for part in (text or '').split(',') if part.strip()] or None


def needs_license(cfg):
    if not cfg.license:
        raise ValueError('license: under which may others use this? Name it by --license=mit, apache-2.0, '
                         'cc-by-4.0, other, …; it depends on the data, and on the model that was begun with')


# ------------------------------------------------------------------------------------------------------------
# a checkpoint

def export_checkpoint(cfg):
    """The published files of a run, its figures, and a card."""
    needs_license(cfg)
    check(cfg.checkpoint)
    if not read_info(cfg.checkpoint):
        raise ValueError(f'{cfg.checkpoint}/config.json has no entry "nanoduplex": train.py did not write it')
    manifest = public_manifest(cfg.checkpoint)
    if not manifest:
        raise ValueError(f'{cfg.checkpoint} has no {NAME}, so nobody can tell which of its files are the '
                         "model's: train.py writes one")
    weights, measured = (os.path.join(cfg.checkpoint, name)
                         for name in ('model.safetensors', 'evaluation/metrics.json'))
    is_measured = os.path.isfile(measured)
    if is_measured and os.path.getmtime(measured) < os.path.getmtime(weights):
        raise ValueError(f'{measured} is older than the weights, so it measured others: run '
                         f'python evaluate.py --checkpoint={cfg.checkpoint} again, or delete it')
    with whole(cfg.out) as part:
        for name in [*manifest, *['evaluation/metrics.json'] * is_measured]:
            os.makedirs(os.path.dirname(os.path.join(part, name)), exist_ok=True)
            shutil.copy(os.path.join(cfg.checkpoint, name), os.path.join(part, name))
        write_json(os.path.join(part, NAME), manifest)
        card.write(part, os.path.basename(os.path.abspath(cfg.out)), cfg.license, names(cfg.language),
                   cfg.base_model, names(cfg.datasets))


# ------------------------------------------------------------------------------------------------------------
# a data set

def features(kind):
    """An Arrow type -> how the datasets library writes it down in a schema"""
    if kind == AUDIO:
        return dict(_type='Audio')
    if pa.types.is_struct(kind):
        return {field.name: features(field.type) for field in kind}
    return [features(kind.value_type)] if pa.types.is_list(kind) else dict(dtype=str(kind), _type='Value')


def with_features(table):
    """The same table, whose schema says its features; what else it says stays."""
    described = {field.name: features(field.type) for field in table.schema}
    said = {'huggingface': json.dumps(dict(info=dict(features=described)))}
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **said})


def heard(dialogues, codec, n):
    """-> a table of the first n dialogues: id, the sound (FLAC, user left, assistant right), who says what"""
    import soundfile
    rows = []
    for i in range(min(n, len(dialogues))):
        dialogue, file = dialogues[i], io.BytesIO()
        soundfile.write(file, render(dialogue, codec).clip(-1, 1), codec.sample_rate, format='FLAC')
        said = '\n'.join(f'{turn["start"] / codec.rate_hz:.2f} s {turn["role"]}: {turn["text"]}'
                         for turn in sorted(dialogue['turns'], key=lambda turn: turn['start']))
        audio = dict(bytes=file.getvalue(), path=f'{dialogues.split}-{i}.flac')
        rows.append(dict(id=dialogue['id'], audio=audio, said=said))
    schema = pa.schema([('id', pa.string()), ('audio', AUDIO), ('said', pa.string())])
    return pa.Table.from_pylist(rows, schema)


def export_data(cfg):
    """Parquet files of a data folder, and a card."""
    needs_license(cfg)
    sets = {split: Dialogues(cfg.data, split) for split in SPLITS
            if glob(os.path.join(escape(cfg.data), f'{split}*.arrow'))}
    if not sets:
        raise ValueError(f'{cfg.data} holds neither Arrow nor parquet files: prepare it first')
    about, codec = next(iter(sets.values())).codec, load_codec(cfg.data) if cfg.n_heard else None
    files = {'codes': {}, 'heard': {}}      # configuration -> {split: its files}
    with whole(cfg.out) as part:
        os.mkdir(part)
        for split, dialogues in sets.items():
            files['codes'][split] = f'codes/{split}-*.parquet'
            paths = list(dict.fromkeys(dialogues.paths))
            for i, path in enumerate(paths):
                table, _ = open_table(path)
                write_parquet(part, f'codes/{split}-{i:05d}-of-{len(paths):05d}.parquet', table, ROWS)
            if cfg.n_heard:
                files['heard'][split] = f'heard/{split}.parquet'
                write_parquet(part, files['heard'][split], heard(dialogues, codec, cfg.n_heard), 10)
        copy_rest(cfg.data, part)
        counts = ', '.join(f'{len(dialogues):,} in {SPLITS[split]}' for split, dialogues in sets.items())
        write_data_card(cfg, part, files, about, f'Dialogues: {counts}.')


def write_parquet(folder, name, table, n_row):
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pq.write_table(with_features(table), path, row_group_size=n_row)


def copy_rest(source, target):
    """What belongs to the records: the codec and the tokenizer."""
    for name in ('codec', 'tokenizer'):
        if os.path.isdir(os.path.join(source, name)):
            shutil.copytree(os.path.join(source, name), os.path.join(target, name))


def write_data_card(cfg, folder, files, codec, counts):
    configs = [dict(config_name=name, data_files=[dict(split=SPLITS[split], path=path)
                                                  for split, path in paths.items()],
                    **dict(default=True) if name == 'codes' else {})
               for name, paths in files.items() if paths]
    head = dict(license=cfg.license, language=names(cfg.language), tags=card.TAGS, configs=configs)
    lines = [f'{key}: {json.dumps(value, ensure_ascii=False)}' for key, value in head.items() if value]
    text = DATA_CARD.format(
        name=os.path.basename(os.path.abspath(cfg.out)), counts=counts, rate_hz=codec['rate_hz'],
        codec=codec['name'], fingerprint=codec['fingerprint'], license=cfg.license,
        heard=f'\nThe configuration `heard` has {cfg.n_heard} dialogues of each split as sound, made from '
              'the codes: user left, assistant right.\n' * bool(files['heard']))
    with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8') as file:
        file.write('---\n' + '\n'.join(lines) + f'\n---\n\n{text}')


def import_data(cfg):
    """A folder that export_data wrote -> a data folder to train on. Every record is compared with its
    checksum."""
    with whole(cfg.out) as part:
        os.mkdir(part)
        for path in sorted(glob(os.path.join(escape(cfg.data), 'codes', '*.parquet'))):
            try:
                table = pq.read_table(path)
                about = json.loads((table.schema.metadata or {})[b'nanoduplex'])
            except (pa.ArrowException, OSError, KeyError, ValueError) as error:
                raise ValueError(f'{path} is no file of hub.py ({error!r:.100}): download it again') from None
            name = os.path.basename(path).replace('.parquet', '.arrow')
            save_table(os.path.join(part, name), table, **about)
        copy_rest(cfg.data, part)
        for split in SPLITS:
            if glob(os.path.join(escape(part), f'{split}-*.arrow')):
                dialogues = Dialogues(part, split)
                for i in range(len(dialogues)):
                    dialogues[i]


def main(cfg):
    if os.path.exists(cfg.out):
        raise ValueError(f'{cfg.out} is there already: name a new folder')
    os.makedirs(os.path.dirname(os.path.abspath(cfg.out)), exist_ok=True)
    if cfg.checkpoint:
        export_checkpoint(cfg)
        print(f'to upload it: hf upload USER/NAME {cfg.out}')
    elif glob(os.path.join(escape(cfg.data), 'codes', '*.parquet')):
        import_data(cfg)
    else:
        export_data(cfg)
        print(f'to upload it: hf upload USER/NAME {cfg.out} --repo-type=dataset')
    print(f'{cfg.out} is written')


if __name__ == '__main__':
    try:
        main(config.load(Config, sys.argv[1:]))
    except ValueError as error:
        raise SystemExit(str(error))
