"""The bundle for browsers: static files with an ES module over onnxruntime-web, and a page that verifies itself."""
