"""What `CrossAttnScorer` is made of: statistics of passes, and what becomes of them."""
