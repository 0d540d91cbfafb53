"""
A user with a browser that nobody sees: the page in headless Chromium, a recording in place of the microphone.

pip install playwright; apt-get install chromium, or any other package that has it
"""
import asyncio
import importlib.util
import io
import json
import os
import shutil
import tempfile
import zipfile
from contextlib import asynccontextmanager

import numpy as np
import soundfile

from common.audio import write_audio
from live.replay import Heard

FLAGS = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync --use-fake-ui-for-media-stream '
         '--use-fake-device-for-media-stream').split()
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
# the page tells its player how late each part comes; of each second the latest is kept, a chunk's first part
LISTEN = '''
    window.lates = {};
    const post = MessagePort.prototype.postMessage;
    MessagePort.prototype.postMessage = function (message, ...more) {
        const second = Math.floor(performance.now() / 1e3);
        if (message.late !== undefined) lates[second] = Math.max(lates[second] ?? -Infinity, message.late);
        return post.call(this, message, ...more);
    };'''


@asynccontextmanager
async def opened(microphone, **settings):
    """A page of a Chromium whose microphone hears a wav, once. settings: of playwright's new_page. Raises
    ValueError where something is not installed."""
    if not (CHROMIUM and importlib.util.find_spec('playwright')):
        raise ValueError('this takes Chromium and playwright: apt-get install chromium, '
                         'pip install playwright')
    from playwright.async_api import async_playwright
    async with async_playwright() as p:
        flags = [*FLAGS, f'--use-file-for-fake-audio-capture={microphone}%noloop']
        browser = await p.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield await browser.new_page(**settings)
        await browser.close()


async def save(page):
    """What the page's button saves -> wave [n_sample, 2], its rate, the assistant's turns"""
    async with page.expect_download() as download:
        await page.keyboard.press('s')
    with zipfile.ZipFile(await (await download.value).path()) as z:
        (wav,), (transcript,) = ([name for name in z.namelist() if name.endswith(end)]
                                 for end in ('.wav', '.jsonl'))
        wave, rate = soundfile.read(io.BytesIO(z.read(wav)), dtype='float32')
        rows = map(json.loads, z.read(transcript).decode().splitlines())
    return wave, rate, [row for row in rows if row['role'] == 'assistant']


async def hear(url, wave, rate):
    """As long as wave (float32 [n_sample]) is -> Heard, without events"""
    behind = []

    def sees(payload):
        event = json.loads(payload)
        if event['type'] == 'nanoduplex.behind':
            behind.append((event['where'], event['dropped_ms']))
    with tempfile.TemporaryDirectory() as folder:
        microphone = os.path.join(folder, 'microphone.wav')
        write_audio(microphone, wave, rate)
        async with opened(microphone) as page:
            page.on('websocket', lambda socket: socket.on('framereceived', sees))
            await page.add_init_script(LISTEN)
            await page.goto(url)
            await page.keyboard.press('t')
            await page.wait_for_function('talk && talk.blocks.length')
            await asyncio.sleep(len(wave) / rate)
            n_glitch, n_lost, lates = await page.evaluate(
                '[talk.n_glitch, talk.n_lost, Object.entries(lates)]')
            both, rate, turns = await save(page)
            version = page.context.browser.version
    dropped_ms = {'network': 10 * n_lost}
    for where, ms in behind:
        dropped_ms[where] = dropped_ms.get(where, 0) + ms
    return Heard(rate, np.ascontiguousarray(both), turns, [(int(sec), 1e3 * late) for sec, late in lates],
                 dropped_ms, n_glitch, browser=f'Chromium {version.split(".")[0]}')
