"""A checkpoint says what it is: what is written is read back, and older folders are still understood."""
import json
import os

import pytest

import evaluate
import train
from checkpoint import Info, load_checkpoint, read_info, write_info
from common.files import whole
from flatten import get_layout

CODEC = dict(name='toy', rate_hz=25.0, n_codes=32, sample_rate=16000, fingerprint='0123456789abcdef')


def write_config(folder, entry):
    (folder / 'config.json').write_text(json.dumps({'vocab_size': 384, 'nanoduplex': entry}))


@pytest.mark.parametrize('layouts', [
    [('duplex3',)], [('asr.user',), ('tts.assistant',), ('duplex3', 7, 3)],
    [('half_duplex', None, None, False), ('duplex2', 5)],
])
def test_info_comes_back_whole(tmp_path, layouts):
    info = Info([get_layout(*layout) for layout in layouts], 5.0, 306, 32, CODEC)
    write_config(tmp_path, write_info(info))
    assert read_info(tmp_path) == info


def test_folders_of_others_and_of_before(tmp_path):
    """Before November 2026 the layouts were names, beside one pair of chunk sizes: speech_chunk as it was
    used (0 for layouts by turns), text_chunk as it was given (None for the layout's own), and whether the
    user's text was learned was not said."""
    write_config(tmp_path, None)
    assert read_info(tmp_path) is None
    before = dict(layout='duplex3', learned=['asr.user', 'duplex3'], speech_chunk=10, text_chunk=None,
                  text_weight=5.0, code_start=306, n_codes=32, codec=CODEC)
    write_config(tmp_path, before)
    layouts = [get_layout('asr.user', 10), get_layout('duplex3')]
    assert read_info(tmp_path) == Info(layouts, 5.0, 306, 32, CODEC)
    write_config(tmp_path, dict(before, layout='asr', learned=['asr'], speech_chunk=0))
    assert read_info(tmp_path).layouts == [get_layout('asr')]


def test_evaluate_measures_the_loss_that_was_trained(small_run, tmp_path):
    """half_duplex without the user's text as a target: evaluate.py counts the tokens training counted."""
    data, base = small_run
    run, on_cpu = str(tmp_path / 'run'), dict(device='cpu', dtype='float32')
    metrics = train.main(train.Config(
        data=str(data), out_dir=run, init_from=str(base), stages='half_duplex:2', learn_user_text=False,
        block_size=256, batch_size=4, batch_tokens=1024, eval_interval=2, warmup_steps=1, tensorboard=False,
        n_listen=0, **on_cpu))
    assert [layout.learn_user_text for layout in load_checkpoint(run).info.layouts] == [True, False]
    measured = evaluate.main(evaluate.Config(
        checkpoint=run, data=str(data), split='val', out=str(tmp_path / 'out'), **on_cpu))
    assert measured['loss']['half_duplex']['loss'] == pytest.approx(metrics['val_loss'], rel=1e-6)


@pytest.mark.parametrize('is_folder', [False, True])
def test_whole_appears_at_once_or_not_at_all(tmp_path, is_folder):
    path = tmp_path / 'a'

    def write(part, text):
        if is_folder:
            os.mkdir(part)
            part = os.path.join(part, 'inside')
        with open(part, 'w') as file:
            file.write(text)

    def content():
        return (path / 'inside' if is_folder else path).read_text()

    with whole(path) as part:
        write(part, 'first')
        assert not path.exists()
    assert content() == 'first'
    with pytest.raises(RuntimeError), whole(path) as part:
        write(part, 'second')
        raise RuntimeError('killed')
    assert content() == 'first' and os.listdir(tmp_path) == ['a']
    with whole(path) as part:
        write(part, 'third')
    assert content() == 'third' and os.listdir(tmp_path) == ['a']
