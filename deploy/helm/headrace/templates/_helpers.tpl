{{- define "headrace.name" -}}
{{- $name := .Release.Name -}}
{{- if not (contains "headrace" $name) -}}{{- $name = printf "%s-headrace" $name -}}{{- end -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "headrace.selector" -}}
app.kubernetes.io/name: headrace
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "headrace.labels" -}}
{{ include "headrace.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{/* What pods of nodes and of fronts have in common. */}}
{{- define "headrace.pod" -}}
automountServiceAccountToken: false
# Variables such as HEADRACE_PORT, which Kubernetes would set for a Service of that name, are settings.
enableServiceLinks: false
# One process of the pod collects what others leave behind when they end.
shareProcessNamespace: true
terminationGracePeriodSeconds: {{ add .root.Values.drainSeconds 30 }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "headrace.selector" . | nindent 8 }}
{{- end }}

{{- define "headrace.container" -}}
image: "{{ .root.Values.image.repository }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}"
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
startupProbe:
  httpGet: {path: /health/live, port: http}
  periodSeconds: 2
  failureThreshold: 60
# Slow: it is for a process that hangs, and a load may take minutes.
livenessProbe:
  httpGet: {path: /health/live, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /health/ready, port: http}
  periodSeconds: 5
  timeoutSeconds: 5
resources: {{- toYaml .values.resources | nindent 2 }}
{{- end }}

{{- define "headrace.env" -}}
- {name: HEADRACE_DRAIN_S, value: {{ .root.Values.drainSeconds | quote }}}
- {name: HEADRACE_LOG_FORMAT, value: json}
- {name: HEADRACE_TOKEN_FILE, value: /run/secrets/headrace/token}
- name: HEADRACE_API_KEYS
  valueFrom: {secretKeyRef: {name: {{ .root.Values.existingSecret }}, key: api-keys}}
- name: HEADRACE_ADMIN_KEYS
  valueFrom: {secretKeyRef: {name: {{ .root.Values.existingSecret }}, key: admin-keys, optional: true}}
- name: HEADRACE_METRICS_KEYS
  valueFrom: {secretKeyRef: {name: {{ .root.Values.existingSecret }}, key: metrics-keys, optional: true}}
{{- with .values.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "headrace.mounts" -}}
- {name: config, mountPath: /etc/headrace, readOnly: true}
- {name: secret, mountPath: /run/secrets/headrace, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "headrace.volumes" -}}
- name: config
  configMap: {name: {{ include "headrace.name" .root }}}
- name: secret
  secret:
    secretName: {{ .root.Values.existingSecret }}
    defaultMode: 0440
    items: [{key: token, path: token}]
- name: tmp
  emptyDir: {}
{{- end }}
