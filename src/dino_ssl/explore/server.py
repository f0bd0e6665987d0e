"""The server of the page, on this computer only."""

import contextlib
import errno
import socket
from pathlib import Path
from typing import Any

from dino_ssl.errors import UserError, import_extra
from dino_ssl.search.index import Index

HOST = "127.0.0.1"
PORTS_TRIED = 50


def listen(port: int) -> socket.socket:
    """Return a socket that listens on this port of 127.0.0.1, or on the next free one."""
    for number in range(port, min(port + PORTS_TRIED, 65536)):
        # With its protocol: asyncio sets TCP_NODELAY only then, without which each response takes 40 ms longer.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, number))
            listener.listen(128)
            return listener
        except OSError as error:
            listener.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise UserError(f"Cannot listen on {HOST}: {error.strerror}.") from error
            reason = error.strerror
    raise UserError(f"The ports from {port} on cannot be used ({reason}): choose another `port`.")


class Server:
    """The page of an index at an address with a token; it is served from `serve` on."""

    def __init__(
        self,
        index: Index,
        *,
        port: int,
        masks: Path | None = None,
        export: Path | None = None,
        read_only: bool = False,
    ) -> None:
        """Take a port. Raises UserError without the packages of the extra `explore`."""
        for module in ("starlette.applications", "uvicorn"):
            import_extra(module, "explore")
        from dino_ssl.explore.app import create_app
        from dino_ssl.explore.explorer import Explorer
        from dino_ssl.explore.security import new_token

        self.listener = listen(port)
        self.port, token = self.listener.getsockname()[1], new_token()
        self.address = f"http://{HOST}:{self.port}/?token={token}"
        self.explorer = Explorer(index, masks=masks, export=export, read_only=read_only)
        _ = self.explorer.about, index.items.labels  # before the first page waits for them
        self.application: Any = create_app(self.explorer, token=token, port=self.port)

    @property
    def is_computing(self) -> bool:
        """True while a long computation runs."""
        return self.explorer.jobs.state["state"] == "running"

    def serve(self) -> None:
        """Answer requests until Ctrl-C or SIGTERM."""
        import uvicorn

        config = uvicorn.Config(
            self.application,
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        with contextlib.suppress(KeyboardInterrupt):  # which the server raises again at its end
            uvicorn.Server(config).run([self.listener])
