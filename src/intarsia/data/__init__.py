"""Text to tokens: fetching, reading, `.bin`/`.idx` files, a corpus that is a pure function of the index. No torch."""
