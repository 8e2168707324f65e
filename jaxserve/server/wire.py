"""HTTP as it comes from the wire: uvicorn's reader, with a limit."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD = 1 << 20
"""Bytes of a request before its body, counted in whole reads of the socket."""


class Protocol(HttpToolsProtocol):
    """Refuses a request whose head has no end, which uvicorn would gather until there is no memory."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._in_head, self._read = True, 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._read += len(data)
            if self._read > HEAD and not self.transport.is_closing():
                self.send_400_response(f"The head of the request has more than {HEAD} bytes.")

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_head, self._read = False, 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
