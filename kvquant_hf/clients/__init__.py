"""What talks to a server of ``kvquant serve``: a chat in a terminal, a page for a browser."""
