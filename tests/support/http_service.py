"""A small real HTTP server, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading

from aiohttp import web


class HttpService:
    """A context. What is POSTed to `path` goes to `heard`. url: where it listens, once it is entered."""

    path = "/{path:.*}"

    def __init__(self):
        self.loop, self.ready = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self._serve, daemon=True)

    async def heard(self, request: web.Request) -> web.Response:
        """The answer."""
        raise NotImplementedError

    def __enter__(self):
        self.thread.start()
        assert self.ready.wait(10)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def _serve(self):
        asyncio.set_event_loop(self.loop)
        application = web.Application()
        application.router.add_post(self.path, self.heard)
        runner = web.AppRunner(application)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        self.ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())
