"""`moderation serve`: a moderator behind HTTP.

bodies.py guards every request before it is parsed, schemas.py checks it and shapes the answer, queue.py
batches the texts of all clients on one thread, and app.py joins these parts and runs the server.
"""
