"""A server of the Model Context Protocol for tests: over stdio, or over HTTP on the port that it is given."""

import os
import sys

from mcp import MCPError
from mcp.server.mcpserver import MCPServer

server = MCPServer("sums")


@server.tool()
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool()
def refuse() -> str:
    """Answer with an error of the protocol."""
    raise MCPError(-32602, "no such sum")


@server.tool()
def crash() -> str:
    """End the server."""
    print("out of luck", file=sys.stderr, flush=True)
    os._exit(3)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
