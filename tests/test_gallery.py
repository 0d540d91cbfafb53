"""Checkpoints side by side: what the page says of each, that it is one file, and that it can be used."""
import base64
import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
from test_report import NASTY, Reader, browser, talk  # noqa: F401

from measures import gallery

soundfile = pytest.importorskip('soundfile')


def answer(text, **more):
    """The reference's answer is 'Two.'"""
    turns = [(0, 'user', 1, 3, NASTY)] + [(1, 'assistant', 3.2, 5, text)] * (text is not None)
    return talk(turns=turns, expected=[dict(role='assistant', start=80, end=125, text='Two.')], **more)


@pytest.fixture
def page(tmp_path):
    """a is right, then says nothing; b is wrong, then right. a was evaluated, b was not."""
    (tmp_path / 'a' / 'evaluation').mkdir(parents=True)
    metrics = dict(answer_accuracy=0.99, response_median_ms=120.4, false_start_rate=None)
    (tmp_path / 'a' / 'evaluation' / 'metrics.json').write_text(json.dumps(metrics))
    talks = [[answer('two'), answer(None)], [answer('Three.'), answer('Two')]]
    gallery.write(str(tmp_path / 'page.html'), [str(tmp_path / 'a'), str(tmp_path / '<b>')], talks, NASTY)
    return tmp_path / 'page.html'


def test_a_page_says_who_was_right(page):
    reader, text = Reader(page), page.read_text(encoding='utf-8')
    assert re.findall('✓ right|✕ wrong, expected: Two|✕ no answer', text) == [
        '✓ right', '✕ wrong, expected: Two', '✕ no answer', '✓ right']
    rows = [re.findall('>([^<]+)</t[hd]>', row) for row in re.findall('<tr>(.*?)</tr>', text)]
    figures = {label: values for label, *values in rows}
    assert figures['answers right below'] == ['1\u00a0of 2', '1\u00a0of 2']
    assert figures['answers right of all'] == ['99\u00a0%', '-']
    assert figures['response, median'] == ['120\u00a0ms', '-']
    assert figures['false starts'] == ['-', '-']
    assert [tag for tag, _ in reader.tags].count('article') == 4


def test_a_page_is_one_file_and_texts_stay_texts(page):
    reader, text = Reader(page), page.read_text(encoding='utf-8')
    assert not re.search(r'https?:|//\w+\.|@import|url\(', re.sub('base64,[^"]+', '', text))
    assert not any(name.startswith('on') for _, attrs in reader.tags for name in attrs)
    assert 'img' not in {tag for tag, _ in reader.tags} and reader.text.count(NASTY) >= 5
    sounds = [attrs for tag, attrs in reader.tags if tag == 'audio']
    assert len(sounds) == 4 and all('controls' in each and each['aria-label'] for each in sounds)
    assert len({each['aria-label'] for each in sounds}) == 2       # both dialogues are called 'one'
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(sounds[0]['src'].split(',')[1])))
    assert rate == 16000 and wave.shape[1] == 2 and len(wave) / rate == pytest.approx(8, abs=0.1)
    assert np.abs(wave[16000:48000, 0]).max() > 0.1 > np.abs(wave[16000:48000, 1]).max()


def test_who_writes_no_text_is_neither_right_nor_wrong(tmp_path):
    gallery.write(str(tmp_path / 'page.html'), ['a', 'b'], [[answer('')], [answer('Two.')]], '')
    text = (tmp_path / 'page.html').read_text(encoding='utf-8')
    assert text.count('✓ right') == 1 and '✕ wrong' not in text and '(speech)' in text
    assert 'evaluate.py' not in text
    assert '<td>no text</td><td>1\u00a0of 1</td>' in text


def test_command_line(small_run, tmp_path, monkeypatch, capsys):
    data, checkpoint = small_run
    other = tmp_path / 'other'
    shutil.copytree(checkpoint, other)

    def made(*arguments):
        monkeypatch.setattr(sys, 'argv', ['gallery', *map(str, arguments), f'--data={data}',
                                          f'--out={tmp_path}/page.html'])
        gallery.main()
    made(checkpoint, other, '--n_dialogue=2')
    assert 'look and listen' in capsys.readouterr().out
    page = (tmp_path / 'page.html').read_text(encoding='utf-8')
    assert page.count('<audio') == 4 and '<h2>d1</h2>' in page and '<h2>d2</h2>' not in page
    with pytest.raises(ValueError, match='--n_dialogue=0'):
        made(checkpoint, '--n_dialogue=0')
    info = json.loads((other / 'config.json').read_text())
    info['nanoduplex']['layouts'] = [dict(name='half_duplex')]
    (other / 'config.json').write_text(json.dumps(info))
    (other / 'manifest.json').unlink()
    with pytest.raises(ValueError, match='other decodes in half_duplex, .* no conversation'):
        made(other)


@pytest.mark.slow
def test_in_a_browser(browser, page):   # noqa: F811
    """Side by side on a screen, below each other on a phone; played from the keyboard, one at a time."""
    for width, is_beside in ((1200, True), (390, False)):
        opened = browser.new_page(viewport=dict(width=width, height=900))
        opened.goto(page.as_uri())
        a, b = (opened.locator('article').nth(i).bounding_box() for i in (0, 1))
        assert (a['y'] == b['y']) == is_beside and opened.evaluate('document.body.scrollWidth') <= width
    opened.wait_for_function('[...document.querySelectorAll("audio")].every(a => a.duration > 7.9)')
    opened.locator('audio').first.press(' ')
    opened.wait_for_function('!document.querySelectorAll("audio")[0].paused')
    states = opened.evaluate('''async () => {
        const [a, b] = document.querySelectorAll('audio');
        a.currentTime = 0;
        await a.play();
        await b.play();
        return [a.paused, a.ended, b.paused];
    }''')
    assert states == [True, False, False]
    opened.close()
