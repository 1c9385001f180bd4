import { defineConfig } from "vite";

// Names without hashes, so that a build changes only what has changed; the server sends ETags.
export default defineConfig({
  base: "/console/",
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  build: {
    outDir: "dist",
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0,
    cssCodeSplit: false,
    modulePreload: false,
    reportCompressedSize: false,
    rolldownOptions: {
      output: {
        entryFileNames: "console.js",
        assetFileNames: "console.[ext]",
        codeSplitting: false,
      },
    },
  },
});
