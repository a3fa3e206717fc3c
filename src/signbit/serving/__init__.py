"""A model that other programs can use: the OpenAI API over HTTP, and a chat in the terminal.

    run.py, app.py         the server: a socket and signals; routes
    schema.py, replies.py  what requests may say; what answers look like
    connection.py          what reaches a socket without being a request
    limits.py, errors.py   who may ask, how much, and what is said to the others
    prompts.py             messages and text to tokens
    scheduler.py           one thread that owns the model; the queue before it
    engine.py              who reads a piece of prompt and who writes a token, step by step
    rows.py                several sequences of any length in one forward
    job.py, sampling.py    one request; how its next token is chosen
    detokenize.py          tokens to text as they come, and where to stop
    conversation.py, terminal.py, wrapping.py    one sequence, kept between turns; a terminal to talk in

Everything up to the scheduler is plain Python and torch, with no thread and no HTTP in it.
"""
