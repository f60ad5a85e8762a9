"""Taking a result away: adapter, merged model or GGUF file, each reloaded and compared with the engine; and the hub."""
