"""
The page says what was found, keeps texts texts, and plays, seeks and is operated as a person would, in
headless Chromium.
"""
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest

from measures import report
from measures.turns import MAX_K, PATIENCE_SEC, assess, summarise

RATE_HZ, SAMPLE_RATE = 25.0, 16000
NASTY = '</script><img src=x onerror="document.title=\'owned\'"> <!-- {{title}} \u2028 & "quoted" 你好'


def talk(id='one', n_sec=8, turns=((0, 'user', 1, 3, 'What is two?'), (1, 'assistant', 3.2, 5, 'Two.')),
         **more):
    """A conversation in which each turn hums; times in seconds."""
    n_frame = int(n_sec * RATE_HZ)
    c = dict(id=id, rate_hz=RATE_HZ, n_frame=n_frame, expected=None, sample_rate=SAMPLE_RATE, chunk_frames=10,
             wave=np.zeros((n_sec * SAMPLE_RATE, 2), np.float32),
             speaks=dict(user=np.zeros(n_frame, bool), assistant=np.zeros(n_frame, bool)), turns=[])
    for channel, role, start, end, text in turns:
        a, b = round(start * RATE_HZ), round(end * RATE_HZ)
        c['turns'].append(dict(role=role, start=a, end=b, text=text))
        c['speaks'][role][a:b] = True
        t = np.arange((b - a) * 640) / SAMPLE_RATE
        sound = 0.3 * np.sin(2 * np.pi * 300 * t) * np.sin(2 * np.pi * 3 * t)**2
        c['wave'][a * 640:b * 640, channel] += sound
    return dict(c, **more)


def turn(start, end, **more):
    """As turns.assess has it; the assistant speaks from response on."""
    response = more.get('response')
    speaks = np.arange(MAX_K) >= (MAX_K if response is None else response)
    default = dict(kind='question', response=None, expects=True, false_start=None, yielded=None,
                   unprompted=None, was_speaking=True, due=None, said=[], speaks_from_end=speaks,
                   speaks_from_start=np.zeros(MAX_K, bool))
    return dict(default, start=start, end=end, **more)


class Reader(html.parser.HTMLParser):
    """What a browser makes of the page: its tags, and the data of its scripts."""
    def __init__(self, path):
        super().__init__()
        self.tags, self.scripts, self.text = [('', {})], {}, ''
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        tag, attrs = self.tags[-1]
        if self.cdata_elem == 'script':
            self.scripts[attrs.get('id', 'code')] = data
        elif tag != 'style':
            self.text += data


def written(tmp_path, *arguments, **options):
    report.write(str(tmp_path / 'report.html'), *arguments, **options)
    assert [file.name for file in tmp_path.iterdir()] == ['report.html']       # nothing half written stays
    return Reader(tmp_path / 'report.html')


def test_one_file_that_asks_for_nothing(tmp_path):
    pytest.importorskip('soundfile')
    reader = written(tmp_path, 'A run', [talk(), talk('two')], figures=[('answers', '97 %', '68 %')])
    page = (tmp_path / 'report.html').read_text(encoding='utf-8')
    assert not re.search(r'https?:|//\w+\.|@import|url\(', page) and '{{' not in page
    assert {attrs.get('src') or attrs.get('href') for _, attrs in reader.tags} == {None, 'data:,'}
    assert ('html', {'lang': 'en'}) in reader.tags
    assert '97\u00a0%' in reader.text and '68\u00a0%' in reader.text
    one, two = json.loads(reader.scripts['dialogues'])
    assert (one['id'], one['both'], one['marks']) == ('one', [], [])
    assert one['spans'] == {'user': [[25, 75]], 'assistant': [[80, 125]]}
    assert len(one['loud']['user']) == 200
    assert {'mp3-0', 'mp3-1'} < set(reader.scripts) and two['mp3'] == 'mp3-1'


def test_a_text_stays_a_text(tmp_path):
    c = talk(NASTY, turns=[(0, 'user', 1, 2, NASTY)], wave=None)
    c['turns'][0]['words'] = [dict(text=NASTY, start=25, end=30)]
    reader = written(tmp_path, NASTY, [c], figures=[(NASTY, NASTY, NASTY)],
                     curves={NASTY: [(0, 1.0), (1, 2.0)]}, note=NASTY)
    assert 'img' not in {tag for tag, _ in reader.tags}
    assert not any(name.startswith('on') for _, attrs in reader.tags for name in attrs)
    assert sum(tag == 'script' for tag, _ in reader.tags) == 2
    page, = json.loads(reader.scripts['dialogues'])
    said, = page['turns']
    assert page['id'] == said['text'] == said['words'][0]['text'] == NASTY
    assert reader.text.count(NASTY) >= 5


def test_marks():
    """
    At 25 Hz a frame is 40 ms: 3 frames after the end are 120 ms; a start 5 frames before it is 200 ms early;
    38 are 1,520, above the 1,500 that count.
    """
    found = [
        turn(10, 20, response=3),
        turn(30, 40, response=-5, false_start=32),
        turn(50, 60, response=38, unprompted=110),
        turn(120, 130),
        turn(140, 150, kind='interruption', yielded=4, response=0),
        turn(160, 170, kind='interruption', expects=False),
        turn(180, 185, kind='backchannel', expects=False),
        turn(190, 195, kind='backchannel', expects=False, yielded=10),
        turn(200, 205, kind='backchannel', expects=False, yielded=90)]
    assert [mark[:4] for mark in report.marks(found, RATE_HZ)] == [
        ('answer', 20, 23, '120 ms'),
        ('false start', 32, 32, '▼ false start'),
        ('answer', 35, 40, '200 ms early'),
        ('late answer', 60, 98, '1,520 ms, late'),
        ('unprompted', 110, 110, '▼ spoke again'),
        ('no answer', 130, 130, '✕ no answer'),
        ('interruption', 140, 144, 'interrupts, yields after 160 ms'),
        ('answer', 150, 150, '0 ms'),
        ('interruption', 160, 160, 'interrupts, never yields'),
        ('backchannel', 180, 180, '○ backchannel'),
        ('backchannel', 190, 190, '○ backchannel, silent after 400 ms'),
        ('backchannel', 200, 200, '○ backchannel')]


def said(text, start=22):
    return dict(role='assistant', start=start, end=start + 10, text=text)


def test_wrong_answers_are_found():
    """Case and full stops are no mistake, as in evaluate.py. Who says nothing gave no answer. Where the model
    writes no text, nobody can tell."""
    due = said('It is Rome.')
    found = [
        turn(10, 20, response=2, due=due, said=[said('it is rome')]),
        turn(10, 20, response=2, due=due, said=[said('It is'), said('Rome.', 40)]),
        turn(10, 20, response=2, due=due, said=[said('It is Oslo.')]),
        turn(10, 20, response=2, said=[said('It is Oslo.')]),
        turn(10, 20, due=due)]
    kinds = [[mark[0] for mark in report.marks([each], RATE_HZ)] for each in found]
    assert kinds == [['answer'], ['answer'], ['answer', 'wrong answer'], ['answer'], ['no answer']]
    assert list(report.marks(found[2:3], RATE_HZ))[1] == ('wrong answer', 22, 22, '✕ wrong answer', 10)
    assert [mark[0] for mark in report.marks(found[2:3], RATE_HZ, has_text=False)] == ['answer']


def test_the_page_marks_wrong_answers_where_there_is_text(tmp_path):
    c = talk(wave=None, expected=[said('Rome.', 80)])
    for text, n in (('Oslo.', 1), ('', 0)):
        c['turns'][1]['text'] = text
        reader = written(tmp_path, 'A run', [c], outcomes=[assess(c)])
        page, = json.loads(reader.scripts['dialogues'])
        assert [mark[0] for mark in page['marks']] == ['answer'] + ['wrong answer'] * n


def test_the_table_has_its_heads_and_sets_apart(tmp_path):
    figures = [('answers', '97 %', '68 %'), ('other tasks', '', ''), ('loss of asr', '19.5', '')]
    written(tmp_path, 'A run', [], figures=figures, heads=('measured', 'Moshi & Co'))
    page = (tmp_path / 'report.html').read_text()
    assert '<th scope="col">measured</th><th scope="col">Moshi &amp; Co</th>' in page
    aside = page[page.index('<tbody><tr><th scope="rowgroup" colspan="3">other tasks</th></tr>'):]
    assert 'loss of asr' in aside and '97' not in aside.split('</table>')[0]
    written(tmp_path, 'A run', [], figures=figures[1:], heads=('measured', 'Moshi'))
    assert 'Moshi' not in (tmp_path / 'report.html').read_text()


def test_plots_say_their_figures(tmp_path):
    """
    Responses after 0, 3 and 10 frames are in by the 1st, 4th and 11th; the fourth comes after 38, 1.52 s,
    which is too late, as in the table. Their median is 3 frames. Of two interruptions one yields after 6
    frames, by the 7th. Each stream has a plot of its own; the last losses are 0.5 and 0.25.
    """
    found = [
        turn(10, 20, response=0),
        turn(30, 40, response=3, kind='interruption', yielded=6),
        turn(50, 60, response=10),
        turn(70, 80, kind='interruption', response=38)]
    # the second half is of a conversation that is not shown
    reader = written(tmp_path, 'A run', [talk(wave=None)], outcomes=[found[:2], found[2:]],
                     curves={'train text': [(0, 2.0), (50, 0.5)], 'train loss': [(0, 0.0), (1, 1.5)],
                             'val text': [(50, 0.25)]})
    says = [attrs['aria-label'] for tag, attrs in reader.tags if tag == 'svg' and attrs.get('role') == 'img']
    times, takes, yields, text, loss = [each.replace('\u00a0', ' ') for each in says]
    assert f'Median 120 ms. 1 of 4 answers came later than {PATIENCE_SEC} s, or not at all.' in times
    full = [dict(each, pauses=[], was_speaking=each['kind'] == 'interruption') for each in found]
    assert summarise(full, RATE_HZ)['no_answer_rate'] == 1 / 4
    assert '4 turns. By frame 1: 25 %, 5: 50 %, 10: 50 %, 25: 75 %.' in takes
    assert '2 turns. By frame 1: 0 %, 5: 0 %, 10: 50 %, 25: 50 %.' in yields
    assert 'Loss of text. At the end: train 0.5, val 0.25.' in text
    assert 'Loss of all streams. At the end: train 1.5.' in loss
    assert set(says) <= {attrs.get('aria-label') for _, attrs in reader.tags}


def test_ticks():
    assert report.ticks(1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert report.ticks(1560) == [0, 500, 1000, 1500]


def test_sound_stays_small_and_in_time(tmp_path):
    """
    Half a minute, in which the two take turns to hum over a little noise: a hundred of them are below 20 MB,
    and each hum begins where it did, to 5 ms.
    """
    soundfile = pytest.importorskip('soundfile')
    from data.made_up import hum
    for rate, n_sec in ((16000, 30), (24000, 4), (8000, 4), (44100, 4)):
        wave = 3e-3 * np.random.default_rng(0).standard_normal((n_sec * rate, 2)).astype(np.float32)
        for at in range(1, n_sec - 1, 2):
            wave[at * rate:(at + 1) * rate, at // 2 % 2] += hum(150, 1.0, rate)
        sound, sample_rate = report.mp3(wave, rate)
        assert sample_rate == min(rate, 16000)
        assert len(sound) * 30 / n_sec * 100 < 20e6, f'{len(sound)} bytes of {n_sec} s at {rate} Hz'
        back, _ = soundfile.read(io.BytesIO(report.base64.b64decode(sound)), dtype='float32')
        step = rate / sample_rate
        m = min(len(back), int(len(wave) / step))
        expected = np.interp(np.arange(m) * step, np.arange(len(wave)), wave[:, 0])
        one, other = (np.fft.rfft(x, 2 * m) for x in (back[:m, 0], expected))
        lag = (int(np.argmax(np.fft.irfft(one * other.conj()))) + m) % (2 * m) - m
        assert abs(lag) <= 0.005 * sample_rate, f'{1e3 * lag / sample_rate:.1f} ms late at {rate} Hz'


def test_no_mp3_is_said(monkeypatch):
    soundfile = pytest.importorskip('soundfile')
    monkeypatch.setattr(soundfile, 'available_formats', lambda: {'WAV': ''})
    with pytest.raises(ValueError, match='cannot write MP3.*pip install'):
        report.mp3(np.zeros((100, 2), np.float32), 16000)


# ---- in a browser

FLAGS = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync '
         '--autoplay-policy=no-user-gesture-required').split()
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api')
    pytest.importorskip('soundfile')
    if not CHROMIUM:
        pytest.skip('no Chromium here')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def hundred(tmp_path_factory):
    """
    One dialogue with all there can be, one long one, 98 more. All but the first have the long one's sound,
    to be encoded once.
    """
    path = tmp_path_factory.mktemp('report') / 'report.html'
    first = talk('first', turns=[
        (0, 'user', 1, 3, NASTY), (1, 'assistant', 2.4, 5, 'Two.'), (0, 'user', 4, 6, 'No, three?'),
        (1, 'assistant', 7, 8, 'Three.')])
    first.update(expected=[dict(role='assistant', start=75, end=95, text='It is two.'),
                           dict(role='assistant', start=96, end=105, text='I th')])     # interrupted
    first['turns'][2]['words'] = [
        dict(text='No,', start=100, end=110), dict(text='three?', start=111, end=150)]
    turns = [(i % 2, report.ROLES[i % 2], i + .1, i + 1, f'number {i}') for i in range(28)]
    turns += [(1, 'assistant', 28.1, 29.6, 'number 28'), (0, 'user', 29.1, 30, 'number 29')]
    conversations = [first, *(talk(f'long {i}', 30, turns) for i in range(99))]
    once = report.mp3(conversations[1]['wave'], SAMPLE_RATE)
    with pytest.MonkeyPatch.context() as patch:
        real = report.mp3
        patch.setattr(report, 'mp3', lambda wave, rate: once if len(wave) > 9 * rate else real(wave, rate))
        report.write(str(path), 'A hundred', conversations, outcomes=[assess(c) for c in conversations],
                     figures=[('answers', '97 %', '68 %')], note='Hums.')
    return path


@pytest.fixture
def opened(browser, hundred):
    """
    opened(option=…) -> the page in its own window. At the end it must have asked for nothing and complained
    of nothing.
    """
    contexts, troubles = [], []

    def on_console(message):
        if message.type in ('error', 'warning'):
            troubles.append(message.text)

    def on_request(request):
        if request.url.split(':')[0] not in ('file', 'data', 'blob'):
            troubles.append(request.url)

    def opened(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on('console', on_console)
        page.on('pageerror', lambda error: troubles.append(str(error)))
        page.on('requestfailed', lambda request: troubles.append(f'failed: {request.url}'))
        page.on('request', on_request)
        page.goto(hundred.as_uri())
        page.wait_for_function('[...players.values()][0].audio.readyState >= 2')
        return page
    yield opened
    for context in contexts:
        context.close()
    assert not troubles, troubles


AUDIO = '[...players.values()].at(-1).audio.'


@pytest.mark.slow
def test_it_opens_at_once(opened, hundred):
    page = opened()
    sec = page.evaluate('performance.getEntriesByType("navigation")[0].loadEventEnd / 1000')
    n_byte = hundred.stat().st_size
    assert 0 < sec < 3 and n_byte < 20e6, f'{sec:.1f} s, {n_byte / 1e6:.1f} MB'
    assert page.title() == 'A hundred'
    assert page.locator('details').count() == 100 and page.locator('img').count() == 0
    first = page.locator('details').first
    assert first.locator('.turn').count() == 6 and first.locator('.both').count() == 2
    assert first.locator('.word').all_inner_texts() == ['No,', 'three?']
    marks = ' '.join(first.locator('.mark').all_inner_texts())
    assert '▼ false start' in marks and 'interrupts, yields after 1,000 ms' in marks and '1,000 ms' in marks
    lines = first.locator('.lines li').all_inner_texts()
    assert len(lines) == 6 and NASTY.split('\u2028')[0].strip() in lines[0].replace('\n', ' ')


@pytest.mark.slow
def test_play_seek_and_keys(opened):
    """
    The lanes are as wide as the dialogue is long: a click at 3/4 of 8 s is at 6.0 s. The second turn starts
    at frame 60, 2.4 s.
    """
    page = opened()
    lanes, head = page.locator('.time').first, page.locator('.head').first
    page.locator('.play').first.click()
    page.wait_for_function(AUDIO + 'currentTime > 0.3')
    assert page.locator('.play').first.inner_text() == '❚❚ Pause'
    assert float(head.evaluate('head => parseFloat(head.style.left)')) > 3
    page.locator('.play').first.click()
    box = lanes.bounding_box()
    lanes.click(position=dict(x=0.75 * box['width'], y=60))
    assert page.evaluate(AUDIO + 'currentTime') == pytest.approx(6.0, abs=0.1)
    assert head.bounding_box()['x'] + 1 == pytest.approx(box['x'] + 0.75 * box['width'], abs=2)
    page.locator('.lines button', has_text='Two.').first.click()
    assert page.evaluate(AUDIO + 'currentTime') == pytest.approx(2.4, abs=0.01)
    assert lanes.evaluate('lanes => lanes === document.activeElement')
    page.keyboard.press('ArrowRight')
    assert page.evaluate(AUDIO + 'currentTime') == pytest.approx(3.4, abs=0.01)
    assert lanes.get_attribute('aria-valuetext') == '3.4 of 8.0 seconds'
    page.keyboard.press('ArrowLeft')
    page.keyboard.press(' ')
    page.wait_for_function(AUDIO + 'currentTime > 2.5')
    assert not page.evaluate(AUDIO + 'paused')
    page.keyboard.press(' ')
    assert page.evaluate(AUDIO + 'paused')
    page.keyboard.press('Home')
    assert page.evaluate(AUDIO + 'currentTime') == 0
    page.keyboard.press('j')
    page.wait_for_function('document.activeElement.getAttribute("aria-label") === "Position in long 0"')
    page.wait_for_function(AUDIO + 'readyState >= 2')
    # from the keyboard: the line keeps the focus; the lanes follow
    page.locator('.lines button', has_text='number 25').press('Enter')
    assert page.evaluate(AUDIO + 'currentTime') == pytest.approx(25.12, abs=0.01)     # frame 628
    head = page.locator('.head').bounding_box()
    assert 0 < head['x'] < page.viewport_size['width']
    page.keyboard.press('k')
    page.wait_for_function('document.activeElement.getAttribute("aria-label") === "Position in first"')


@pytest.mark.slow
def test_one_plays_at_a_time_and_in_time(opened):
    """In the first dialogue a hum starts at 1 s in the left channel, at 2.4 s in the right: so, to 30 ms."""
    page = opened()
    page.locator('summary').nth(1).click()
    page.wait_for_function('players.size === 2 && [...players.values()].every(player => '
                           'player.audio.readyState >= 2)')
    page.locator('.play').nth(0).click()
    page.wait_for_function('!([...players.values()][0].audio.paused)')
    page.locator('.play').nth(1).click()
    page.wait_for_function('[...players.values()].map(player => player.audio.paused).join() === '
                           '"true,false"', timeout=2000)
    starts, n_sec = page.evaluate('''async () => {
        const wav = await (await fetch([...players.values()][0].audio.src)).arrayBuffer(), samples = new
        Int16Array(wav, 44); return [[0, 1].map(channel => { let i = channel; while (Math.abs(samples[i]) <
        200) i += 2; return i / 2 / 16000 }), samples.length / 2 / 16000];
    }''')
    assert starts == pytest.approx([1.0, 2.4], abs=0.03) and n_sec == pytest.approx(8, abs=0.1)


@pytest.mark.slow
def test_filter(opened):
    page = opened()
    page.locator('#filter').select_option(label='with wrong answer (1)')
    assert page.locator('details:visible h3').all_inner_texts() == ['first']
    assert '✕ wrong answer' in page.locator('details:visible .tags + .length, .lines small').all_inner_texts()


@pytest.mark.slow
def test_on_a_phone_in_the_dark(opened):
    phone = opened(viewport=dict(width=390, height=844), has_touch=True, is_mobile=True)
    assert phone.evaluate('document.documentElement.scrollWidth') <= 390
    assert phone.locator('.legend').is_visible() and not phone.locator('.hint').is_visible()
    # 120 px a second, where a dialogue is wider than the page
    phone.locator('.time').first.tap(position=dict(x=220, y=60))
    assert phone.evaluate(AUDIO + 'currentTime') == pytest.approx(220 / 120, abs=0.05)
    paper = 'getComputedStyle(document.body).backgroundColor'
    dark = opened(color_scheme='dark').evaluate(paper)
    assert dark != phone.evaluate(paper) and max(map(int, re.findall(r'\d+', dark))) < 64


@pytest.mark.slow
def test_nothing_is_cut_off(opened):
    """Tags take as many lines as they need; a mark at the end of a dialogue has its label before it."""
    for width in (1200, 700, 390):
        page = opened(viewport=dict(width=width, height=900))
        cut = page.evaluate('''() => [...document.querySelectorAll('.tags, .length')].slice(0, 4)
            .filter(e => e.scrollWidth > e.clientWidth || e.scrollHeight > e.clientHeight + 1).length''')
        assert cut == 0, f'{cut} tags are cut off at {width} px'
        page.locator('summary').nth(1).click()
        page.wait_for_function('players.size === 2')
        assert '○ backchannel, silent after 480 ms' in page.locator('.mark.back').all_inner_texts()
        over = page.evaluate('''() => [...document.querySelectorAll('.mark span')].filter(e =>
            e.getBoundingClientRect().right > e.closest('.time').getBoundingClientRect().right + 1)
            .map(e => e.textContent)''')
        assert over == [], f'{over} run out of the lanes at {width} px'


@pytest.mark.slow
def test_contrast(opened):
    """Of every text with its background, in light and dark, at least 4.5 to 1 (WCAG AA)."""
    for scheme in ('light', 'dark'):
        worst = opened(color_scheme=scheme).evaluate('''() => {
            const rgba = text => {
                const n = text.match(/[\\d.]+/g).map(Number);
                return n.length < 4 ? [...n, 1] : n;
            };
            const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
            const luminance = c => c.slice(0, 3).map(v => linear(v / 255))
                .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
            const ground = e => {       // the first element around it that is not transparent
                const c = rgba(getComputedStyle(e).backgroundColor);
                return c[3] === 1 ? c : ground(e.parentElement);
            };
            const contrast = e => {
                const style = getComputedStyle(e), ink = e.closest('svg') ? style.fill : style.color;
                const [dark, light] = [rgba(ink), ground(e)].map(luminance).sort((a, b) => a - b);
                return [(light + .05) / (dark + .05), e.className.baseVal ?? e.className,
                        e.textContent.slice(0, 20)];
            };
            const hasText = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
            const texts = [...document.querySelectorAll('main *')].filter(
                e => e.checkVisibility() && hasText(e));
            return texts.map(contrast).sort((a, b) => a[0] - b[0])[0];
        }''')
        assert worst[0] >= 4.5, f'{scheme}: {worst}'
