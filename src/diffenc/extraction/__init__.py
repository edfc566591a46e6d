"""Features of many pictures: one object for every engine, and folders of shards on disk."""
