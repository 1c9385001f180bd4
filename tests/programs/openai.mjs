// OpenAI's package for Node: streams, tools and errors; prints what came as JSON.
import assert from 'node:assert'
import OpenAI from 'openai'

const client = new OpenAI({ baseURL: process.argv[2], apiKey: 'none', maxRetries: 0 })
const model = 'echo'
const call = '<tool_call>{"name": "read_file", "arguments": {"path": "notes.txt"}}</tool_call>'
const messages = [{ role: 'user', content: call }]
const parameters = { type: 'object', properties: { path: { type: 'string' } }, required: ['path'] }
const read_file = ({ path }) => `The secret word of ${path} is heron.`
const runnable = { name: 'read_file', parameters, parse: JSON.parse, function: read_file }
const tools = [{ type: 'function', function: runnable }]

for (const stream of [false, true]) {
  const runner = client.chat.completions.runTools({ model, stream, messages, tools })
  assert.match(await runner.finalContent(), /The secret word of notes.txt is heron./)
}

let text = '', usage
const hello = [{ role: 'user', content: 'Hello, rivers.' }]
const options = { include_usage: true }
const chat = { model, stream: true, stream_options: options, messages: hello }
for await (const chunk of await client.chat.completions.create(chat)) {
  text += chunk.choices[0]?.delta?.content ?? ''
  usage = chunk.usage ?? usage
}
assert.equal(text, 'Hello, rivers.')
assert.equal(usage.completion_tokens, 15)

const flat = [{ type: 'function', name: 'read_file', parameters, strict: false }]
const stream = client.responses.stream({ model, input: call, tools: flat })
const kinds = []
for await (const event of stream) kinds.push(event.type)
assert.equal(kinds.at(0), 'response.created')
assert.equal(kinds.at(-1), 'response.completed')
const [called] = (await stream.finalResponse()).output
assert.deepEqual(JSON.parse(called.arguments), { path: 'notes.txt' })
const output = { type: 'function_call_output', call_id: called.call_id, output: read_file({ path: 'a' }) }
const input = [{ role: 'user', content: call }, called, output]
const answer = await client.responses.create({ model, input, tools: flat })
assert.match(answer.output_text, /The secret word of a is heron./)

assert.ok((await client.models.list()).data.some(({ id }) => id === model))
assert.equal((await client.completions.create({ model, prompt: 'abc' })).choices[0].text, 'abc')
await assert.rejects(client.models.retrieve('none'), OpenAI.NotFoundError)
const large = { model, messages: hello, temperature: 99 }
await assert.rejects(client.chat.completions.create(large), OpenAI.BadRequestError)
