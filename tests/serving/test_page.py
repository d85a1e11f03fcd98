"""The page at / in a browser, with the server that sent it."""

from charlstm import api
from tests.browser import chromium
from tests.interop.test_sampling_page import SETTLED, ask
from tests.serving.conftest import started


def test_the_page_writes_what_the_server_does(runs, tmp_path):
    model = api.load(runs["characters"])
    with started(runs["characters"], "--slots=4", "--max_prompt=500") as (_, address), chromium(tmp_path) as page:
        page.open(f"{address}/")
        assert model.run_dir.name in page.run("document.title")
        for seed in (3, 4):
            text = model.sample("abc", 60, temperature=0.5, top_k=4, seed=seed)[3:]
            assert ask(page, prompt="abc", seed=seed, topK=4, temperature=0.5, count=60) == text
            # Going on is the text that was not interrupted.
            assert ask(page, prompt="abc", seed=seed, topK=4, temperature=0.5, count=25) == text[:25]
            page.run("(form.elements.count.value = 35, document.querySelector('.on').click())")
            assert page.run(SETTLED) == text
        assert not page.errors and all(url.startswith(address) for url in page.requested)
        ask(page, prompt="a" * 501, count=3)
        assert "may have 500" in page.run("document.querySelector('.status').textContent") and page.run(SETTLED) == ""
        page.screenshot(tmp_path / "page.png")
