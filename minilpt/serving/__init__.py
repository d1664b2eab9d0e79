"""`minilpt serve`: a model behind the HTTP contract of text-embeddings-inference. Needs the extra `serve`.

`options` knows the command line only and `service` no HTTP; `app` is the routes, `server` the process.
"""
